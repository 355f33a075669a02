"""Normalisations.

Legend: T tokens, M model features.
"""

import torch

from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.registry import Priority, kernel

__all__ = ["add_rms_norm", "rms_norm"]


@kernel("norm.rms_norm", solution="reference", formats=DENSE, priority=Priority.REFERENCE)
def rms_norm(x_TM: torch.Tensor, weight_M: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The formula, in float32."""
    wide_TM = x_TM.float()
    scale_T1 = torch.rsqrt(wide_TM.square().mean(-1, keepdim=True) + epsilon)
    return (wide_TM * scale_T1 * weight_M.float()).to(weight_M.dtype)


@kernel("norm.add_rms_norm", solution="reference", formats=DENSE, priority=Priority.REFERENCE)
def add_rms_norm(
    x_TM: torch.Tensor, residual_TM: torch.Tensor, weight_M: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, then its norm."""
    sum_TM = x_TM + residual_TM
    return rms_norm(sum_TM, weight_M, epsilon), sum_TM
