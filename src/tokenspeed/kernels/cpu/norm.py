"""Root-mean-square norms; a row's result is the same bits in any batch.

Legend: T tokens, M model features.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.activations import QUANTISED_ROWS, QuantisedRows
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.registry import Priority, kernel

__all__ = ["add_rms_norm", "add_rms_norm_quantised", "rms_norm", "rms_norm_quantised"]

_CPU = Capability(device="cpu")
_FORMATS = ("float32", "bfloat16")


@kernel("norm.rms_norm", solution="cpu", requires=_CPU, formats=_FORMATS, priority=Priority.NATIVE)
def rms_norm(
    x_TM: torch.Tensor, weight_M: torch.Tensor, epsilon: float, *, runtime: CpuRuntime
) -> torch.Tensor:
    """Two passes over each row."""
    y_TM = torch.empty(x_TM.shape, dtype=weight_M.dtype)
    if x_TM.dim() == 2:
        _cpu.add_rms_norm(runtime, x_TM, None, weight_M, epsilon, None, y_TM)
        return y_TM
    # Heads that lie in a wider row, as those of queries and keys do, are no rows of one matrix.
    for head in range(x_TM.shape[1]):
        _cpu.add_rms_norm(runtime, x_TM[:, head], None, weight_M, epsilon, None, y_TM[:, head])
    return y_TM


@kernel(
    "norm.add_rms_norm", solution="cpu", requires=_CPU, formats=_FORMATS, priority=Priority.NATIVE
)
def add_rms_norm(
    x_TM: torch.Tensor,
    residual_TM: torch.Tensor,
    weight_M: torch.Tensor,
    epsilon: float,
    *,
    runtime: CpuRuntime,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum is float32; it is written once and read once."""
    sum_TM = torch.empty(x_TM.shape)
    y_TM = torch.empty(x_TM.shape, dtype=weight_M.dtype)
    _cpu.add_rms_norm(runtime, x_TM, residual_TM, weight_M, epsilon, sum_TM, y_TM)
    return y_TM, sum_TM


@kernel(
    "norm.rms_norm",
    solution="cpu",
    requires=_CPU,
    formats=(QUANTISED_ROWS,),
    priority=Priority.NATIVE,
)
def rms_norm_quantised(
    x_TM: torch.Tensor, weight_M: torch.Tensor, epsilon: float, *, runtime: CpuRuntime
) -> QuantisedRows:
    """As `rms_norm`, rounded to bytes and nothing between."""
    y_TM = QuantisedRows.empty(*x_TM.shape, dtype=weight_M.dtype, runtime=runtime)
    _cpu.add_rms_norm(runtime, x_TM, None, weight_M, epsilon, None, y_TM.memory)
    return y_TM


@kernel(
    "norm.add_rms_norm",
    solution="cpu",
    requires=_CPU,
    formats=(QUANTISED_ROWS,),
    priority=Priority.NATIVE,
)
def add_rms_norm_quantised(
    x_TM: torch.Tensor,
    residual_TM: torch.Tensor,
    weight_M: torch.Tensor,
    epsilon: float,
    *,
    runtime: CpuRuntime,
) -> tuple[QuantisedRows, torch.Tensor]:
    """As `add_rms_norm`, the norm rounded to bytes and nothing between."""
    sum_TM = torch.empty(x_TM.shape)
    y_TM = QuantisedRows.empty(*x_TM.shape, dtype=weight_M.dtype, runtime=runtime)
    _cpu.add_rms_norm(runtime, x_TM, residual_TM, weight_M, epsilon, sum_TM, y_TM.memory)
    return y_TM, sum_TM
