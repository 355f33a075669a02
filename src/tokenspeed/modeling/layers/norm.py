"""Root-mean-square norm, with the addition to the residual stream that comes before it.

Legend: T tokens, M model features.
"""

import torch

from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.placement import PerToken, boundary

__all__ = ["RMSNorm"]


@boundary(
    x_TM=PerToken("tp"),
    residual_TM=PerToken("tp"),
    outs=(PerToken("tp"), PerToken("tp")),
)
class RMSNorm(Module):
    """Adds x to the residual stream and normalises the sum (Zhang and Sennrich 2019).

    The stream is float32 whatever the model's type. It is by far the largest sum of the model, and
    in bfloat16 its rounding would make half of all the error of the logits.

    Args:
        features: M.
        epsilon: added to the mean square.
        kernels: chooses the norm.
    """

    wide_inputs = frozenset({"x_TM"})

    def __init__(self, features: int, *, epsilon: float, kernels: KernelSelector) -> None:
        self.weight = Weight((features,), dims=("features",), kernels=kernels)
        self._epsilon = epsilon
        self._rms_norm = kernels.select(ops.norm.rms_norm)
        self._add_rms_norm = kernels.select(ops.norm.add_rms_norm)

    def forward(
        self, x_TM: torch.Tensor, residual_TM: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual). Without a residual x, float32, begins the stream."""
        if residual_TM is None:
            return self._rms_norm(x_TM, self.weight.tensor, self._epsilon), x_TM
        return self._add_rms_norm(x_TM, residual_TM, self.weight.tensor, self._epsilon)
