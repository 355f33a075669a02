"""Owns the declarations of normalisations; never computes one.

Legend: T tokens, M model features.
"""

import torch

from tokenspeed.kernels.activations import Activations
from tokenspeed.kernels.registry import declare_op

__all__ = ["add_rms_norm", "rms_norm"]


@declare_op("norm.rms_norm")
def rms_norm(x_TM: torch.Tensor, weight_M: torch.Tensor, epsilon: float) -> Activations:
    """x / sqrt(mean(x^2) + epsilon) * weight per token (Zhang and Sennrich 2019).

    x may have heads between tokens and features, each normed by itself. It may be wider than the
    weight; the arithmetic is float32, and the result is rounded once, to the weight's type or to
    the format that its reader asks for, which is the op's.
    """
    return rms_norm.best(x_TM)(x_TM, weight_M, epsilon)


@declare_op("norm.add_rms_norm")
def add_rms_norm(
    x_TM: torch.Tensor, residual_TM: torch.Tensor, weight_M: torch.Tensor, epsilon: float
) -> tuple[Activations, torch.Tensor]:
    """sum = x + residual, both sum and residual float32; gives (rms_norm(sum), sum)."""
    return add_rms_norm.best(x_TM)(x_TM, residual_TM, weight_M, epsilon)
