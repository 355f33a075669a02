"""Gated activations; a row's result is the same bits in any batch.

Legend: T tokens, F features of the MLP.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.activations import QUANTISED_ROWS, QuantisedRows
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.registry import Priority, kernel

__all__ = [
    "gelu_tanh_and_mul",
    "gelu_tanh_and_mul_quantised",
    "silu_and_mul",
    "silu_and_mul_quantised",
]


@kernel(
    "activation.silu_and_mul",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=("float32", "bfloat16"),
    priority=Priority.NATIVE,
)
def silu_and_mul(gate_up_T2F: torch.Tensor, *, runtime: CpuRuntime) -> torch.Tensor:
    """One pass in float32, rounded once."""
    x_TF = gate_up_T2F.new_empty((len(gate_up_T2F), gate_up_T2F.shape[1] // 2))
    _cpu.gate(runtime, "silu", gate_up_T2F, x_TF)
    return x_TF


@kernel(
    "activation.silu_and_mul",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=(QUANTISED_ROWS,),
    priority=Priority.NATIVE,
)
def silu_and_mul_quantised(gate_up_T2F: torch.Tensor, *, runtime: CpuRuntime) -> QuantisedRows:
    """As `silu_and_mul`, rounded to bytes and nothing between."""
    tokens, width = gate_up_T2F.shape
    x_TF = QuantisedRows.empty(tokens, width // 2, dtype=gate_up_T2F.dtype, runtime=runtime)
    _cpu.gate(runtime, "silu", gate_up_T2F, x_TF.memory)
    return x_TF


@kernel(
    "activation.gelu_tanh_and_mul",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=("float32", "bfloat16"),
    priority=Priority.NATIVE,
)
def gelu_tanh_and_mul(gate_up_T2F: torch.Tensor, *, runtime: CpuRuntime) -> torch.Tensor:
    """One pass in float32, rounded once."""
    x_TF = gate_up_T2F.new_empty((len(gate_up_T2F), gate_up_T2F.shape[1] // 2))
    _cpu.gate(runtime, "gelu_tanh", gate_up_T2F, x_TF)
    return x_TF


@kernel(
    "activation.gelu_tanh_and_mul",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=(QUANTISED_ROWS,),
    priority=Priority.NATIVE,
)
def gelu_tanh_and_mul_quantised(gate_up_T2F: torch.Tensor, *, runtime: CpuRuntime) -> QuantisedRows:
    """As `gelu_tanh_and_mul`, rounded to bytes and nothing between."""
    tokens, width = gate_up_T2F.shape
    x_TF = QuantisedRows.empty(tokens, width // 2, dtype=gate_up_T2F.dtype, runtime=runtime)
    _cpu.gate(runtime, "gelu_tanh", gate_up_T2F, x_TF.memory)
    return x_TF
