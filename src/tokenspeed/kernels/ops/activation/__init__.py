"""Owns the declarations of gated activations; never computes one.

Legend: T tokens, F features of the MLP.
"""

import torch

from tokenspeed.kernels.activations import Activations
from tokenspeed.kernels.registry import declare_op

__all__ = ["silu_and_mul"]


@declare_op("activation.silu_and_mul")
def silu_and_mul(gate_up_T2F: torch.Tensor) -> Activations:
    """silu(gate) * up, gate the first half of the last dimension and up the second; gives x_TF.

    SwiGLU (Shazeer 2020). The arithmetic is float32, and the result is rounded once, to x's type
    or to the format that its reader asks for, which is the op's.
    """
    return silu_and_mul.best(gate_up_T2F)(gate_up_T2F)
