"""Products with weights.

Legend: T tokens, I inputs, O outputs.
"""

from collections.abc import Mapping, Sequence

import torch

from tokenspeed.kernels import (
    PACKED,
    PACKED_FLOAT4,
    PACKED_GROUPS,
    QUANTISED,
    Activations,
    KernelSelector,
    ops,
)
from tokenspeed.kernels.quantised import FLOAT4_GROUP
from tokenspeed.modeling.cut import Cut
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.placement import Partial, PerToken, Replicate, Shard, boundary

__all__ = ["ColumnLinear", "Linear", "RowLinear", "features_cut"]

# Inputs that types of quantised weights keep together, the largest first: GGUF's, and others'.
BLOCKS, GROUPS, FLOAT4 = (256, 32), (128, 64, 32), (FLOAT4_GROUP,)


@boundary(x_TI=PerToken("tp"), out=PerToken("tp"))
class Linear(Module):
    """y = x W^T + b. Every rank holds the whole weight; subclasses divide it.

    Args:
        inputs: I.
        outputs: O.
        kernels: chooses the product.
        bias: whether b exists.
        parts: sizes of named products whose weights are stacked along O.
        cut: where ranks may divide what they divide; anywhere if None.
        orders: as of `Weight`, for the weight's rows and the bias.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernels: KernelSelector,
        bias: bool = False,
        parts: Mapping[str, int] | None = None,
        cut: Cut | None = None,
        orders: Mapping[str | None, Sequence[int]] | None = None,
    ) -> None:
        # Whichever of the two the boundary has divided.
        cuts = {"outputs": cut, "inputs": cut} if cut else {}
        format_name = kernels.weight_format(ops.gemm.linear)
        self.weight = Weight(
            (outputs, inputs),
            dims=("outputs", "inputs"),
            kernels=kernels,
            format_name=format_name,
            parts=parts,
            cuts=cuts,
            orders=orders,
        )
        self.bias: Weight | None = None
        if bias:
            self.bias = Weight(
                (outputs,),
                dims=("outputs",),
                kernels=kernels,
                parts=parts,
                cuts={"outputs": cut} if cut else {},
                orders=orders,
            )
        self._linear = kernels.select(
            ops.gemm.linear, format_name=format_name, traits={"bias": bias}
        )
        self.reads = kernels.reads(ops.gemm.linear, format_name=format_name, traits={"bias": bias})

    def forward(self, x_TI: Activations) -> torch.Tensor:
        """y_TO."""
        return self._linear(x_TI, self.weight.data, self.bias.tensor if self.bias else None)


@boundary(x_TI=Replicate("tp"), out=Shard("tp", "features"))
class ColumnLinear(Linear):
    """Each rank computes its share of the outputs."""


@boundary(x_TI=Shard("tp", "features"), out=Partial("tp"))
class RowLinear(Linear):
    """Each rank sums over its share of the inputs."""


def features_cut(features: int, kernels: KernelSelector) -> Cut:
    """Where features between two products may be cut: blocks of packed weights stay whole."""
    formats = {kernels.weight_format(op) for op in (ops.gemm.linear, ops.moe.experts)}
    blocks: tuple[int, ...] = ()
    if PACKED in formats:
        blocks = BLOCKS
    elif formats & {*QUANTISED, PACKED_GROUPS}:
        blocks = GROUPS
    elif PACKED_FLOAT4 in formats:
        blocks = FLOAT4
    return Cut(unit=next((block for block in blocks if features % block == 0), 1))
