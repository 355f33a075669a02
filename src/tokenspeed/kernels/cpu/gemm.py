"""Products and lookups with packed weights.

For quantised weights inputs are quantised to bytes with a scale for each 32; sums are exact
integers within 32 inputs, and float32 in the order of inputs beyond. For dense weights inputs are
taken as they are. A row's result is the same bits in any batch. The formulas of a cell stand in
`csrc/cpu/gemm.inl` and `csrc/cpu/dense.inl`.

Legend: T tokens, S sampled tokens, I inputs, O outputs, V vocabulary, M model features.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.registry import ANY, Priority, kernel
from tokenspeed.kernels.weights import PACKED, PANELS, Matrix, PackedWeight

__all__ = ["linear", "logits", "lookup"]

_CPU = Capability(device="cpu")
_FORMATS = (PACKED, *PANELS)


@kernel(
    "gemm.linear",
    solution="cpu",
    requires=_CPU,
    formats=_FORMATS,
    traits={"bias": ANY},
    priority=Priority.NATIVE,
)
def linear(
    x_TI: torch.Tensor, weight_OI: Matrix, bias_O: torch.Tensor | None, *, runtime: CpuRuntime
) -> torch.Tensor:
    """Rounded once, to the type of x: float32 or bfloat16."""
    assert isinstance(weight_OI, PackedWeight)
    y_TO = x_TI.new_empty((len(x_TI), weight_OI.shape[0]))
    _cpu.linear(runtime, x_TI, weight_OI.matrices, bias_O, y_TO)
    return y_TO


@kernel("gemm.logits", solution="cpu", requires=_CPU, formats=_FORMATS, priority=Priority.NATIVE)
def logits(x_SI: torch.Tensor, weight_VI: Matrix, *, runtime: CpuRuntime) -> torch.Tensor:
    """float32 whatever the type of x."""
    assert isinstance(weight_VI, PackedWeight)
    logits_SV = x_SI.new_empty((len(x_SI), weight_VI.shape[0]), dtype=torch.float32)
    _cpu.linear(runtime, x_SI, weight_VI.matrices, None, logits_SV)
    return logits_SV


@kernel(
    "embedding.lookup", solution="cpu", requires=_CPU, formats=_FORMATS, priority=Priority.NATIVE
)
def lookup(token_ids_T: torch.Tensor, table_VM: Matrix, *, runtime: CpuRuntime) -> torch.Tensor:
    """The rows of the table, dequantised."""
    assert isinstance(table_VM, PackedWeight)
    (table,) = table_VM.matrices
    x_TM = torch.empty((len(token_ids_T), table_VM.shape[1]))
    _cpu.lookup(runtime, token_ids_T, table, x_TM)
    return x_TM
