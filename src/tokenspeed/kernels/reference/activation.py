"""Gated activations.

Legend: T tokens, F features of the MLP.
"""

import torch
import torch.nn.functional as F

from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.registry import Priority, kernel

__all__ = ["gelu_tanh_and_mul", "silu_and_mul"]


@kernel(
    "activation.gelu_tanh_and_mul",
    solution="reference",
    formats=DENSE,
    priority=Priority.REFERENCE,
)
def gelu_tanh_and_mul(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """The formula, in float32."""
    gate_TF, up_TF = gate_up_T2F.float().chunk(2, dim=-1)
    return (F.gelu(gate_TF, approximate="tanh") * up_TF).to(gate_up_T2F.dtype)


@kernel("activation.silu_and_mul", solution="reference", formats=DENSE, priority=Priority.REFERENCE)
def silu_and_mul(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """The formula, in float32."""
    gate_TF, up_TF = gate_up_T2F.float().chunk(2, dim=-1)
    return (F.silu(gate_TF) * up_TF).to(gate_up_T2F.dtype)
