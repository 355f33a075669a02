"""Owns the declarations of matrix products with weights; never computes one.

Legend: T tokens, S sampled tokens, H heads, I inputs, O outputs, V vocabulary.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from tokenspeed.kernels.activations import Activations
from tokenspeed.kernels.registry import declare_op
from tokenspeed.kernels.weights import Matrix, PackedWeight

__all__ = ["HeadMatrices", "heads", "linear", "logits"]

HeadMatrices: TypeAlias = torch.Tensor | Sequence[PackedWeight]
"""A matrix of each head: a tensor [H, O, I], or packed ones in order."""


@declare_op("gemm.heads")
def heads(x_THI: torch.Tensor, weight_HOI: HeadMatrices) -> torch.Tensor:
    """y_THO, of each head its own product: y[t, h] = weight[h] @ x[t, h].

    Sums are at least float32; the result has x's element type and is rounded once. Heads of x may
    lie in wider rows, as parts of queries do.
    """
    weight = None if isinstance(weight_HOI, torch.Tensor) else weight_HOI[0]
    return heads.best(x_THI, weight=weight)(x_THI, weight_HOI)


@declare_op("gemm.linear", traits=("bias",))
def linear(x_TI: Activations, weight_OI: Matrix, bias_O: torch.Tensor | None) -> torch.Tensor:
    """y_TO = x_TI @ weight_OI.T + bias_O.

    Sums are at least float32; the result has x's element type and is rounded once.

    Traits:
        bias: whether there is one.
    """
    operand = x_TI if isinstance(x_TI, torch.Tensor) else x_TI.memory
    return linear.best(operand, weight=weight_OI, bias=bias_O is not None)(x_TI, weight_OI, bias_O)


@declare_op("gemm.logits")
def logits(x_SI: Activations, weight_VI: Matrix) -> torch.Tensor:
    """y_SV = x_SI @ weight_VI.T, in float32 whatever the element type of x.

    Logits of a wide model lie close together, so rounding them to bfloat16 would make ties:
    the result must be as exact as its float32 sums.
    """
    operand = x_SI if isinstance(x_SI, torch.Tensor) else x_SI.memory
    return logits.best(operand, weight=weight_VI)(x_SI, weight_VI)
