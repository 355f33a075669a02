"""The gated feed-forward network.

Legend: T tokens, M model features, F features of the network.
"""

import torch

from tokenspeed.kernels import Activations, KernelSelector, Op, ops
from tokenspeed.modeling.layers.linear import ColumnLinear, RowLinear, features_cut
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.placement import Partial, Replicate, boundary

__all__ = ["GatedMLP"]


@boundary(x_TM=Replicate("tp"), out=Partial("tp"))
class GatedMLP(Module):
    """down(act(gate(x)) * up(x)), act silu or gelu (SwiGLU and GeGLU, Shazeer 2020).

    Args:
        hidden_size: M.
        intermediate_size: F.
        bias: whether the three projections add one.
        kernels: chooses the ops.
        activation: the gated one.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        bias: bool,
        kernels: KernelSelector,
        activation: Op[[torch.Tensor], Activations] = ops.activation.silu_and_mul,
    ) -> None:
        cut = features_cut(intermediate_size, kernels)
        self.gate_up = ColumnLinear(
            hidden_size,
            2 * intermediate_size,
            kernels=kernels,
            bias=bias,
            parts={"gate": intermediate_size, "up": intermediate_size},
            cut=cut,
        )
        self.reads = self.gate_up.reads
        self.down = RowLinear(intermediate_size, hidden_size, kernels=kernels, bias=bias, cut=cut)
        activated = kernels.result_format(activation, reads=self.down.reads)
        self._activate = kernels.select(activation, format_name=activated)

    def forward(self, x_TM: Activations) -> torch.Tensor:
        """out_TM."""
        out_TM: torch.Tensor = self.down(self._activate(self.gate_up(x_TM)))
        return out_TM
