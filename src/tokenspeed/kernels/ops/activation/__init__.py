"""Owns the declarations of gated activations; never computes one.

Legend: T tokens, F features of the MLP.
"""

import torch

from tokenspeed.kernels.activations import Activations
from tokenspeed.kernels.registry import declare_op

__all__ = ["gelu_tanh_and_mul", "silu_and_mul"]


@declare_op("activation.gelu_tanh_and_mul")
def gelu_tanh_and_mul(gate_up_T2F: torch.Tensor) -> Activations:
    """gelu(gate) * up, otherwise as `silu_and_mul`.

    gelu is the form with tanh: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and
    Gimpel 2016; GeGLU, Shazeer 2020).
    """
    return gelu_tanh_and_mul.best(gate_up_T2F)(gate_up_T2F)


@declare_op("activation.silu_and_mul")
def silu_and_mul(gate_up_T2F: torch.Tensor) -> Activations:
    """silu(gate) * up, gate the first half of the last dimension and up the second; gives x_TF.

    SwiGLU (Shazeer 2020). The arithmetic is float32, and the result is rounded once, to x's type
    or to the format that its reader asks for, which is the op's.
    """
    return silu_and_mul.best(gate_up_T2F)(gate_up_T2F)
