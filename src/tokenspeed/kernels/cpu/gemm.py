"""Products and lookups with packed weights.

For quantised weights inputs are bytes with a scale for each 32, which the op that computed them
wrote, or else the product itself makes of them; sums are exact
integers within 32 inputs, and float32 in the order of inputs beyond. For dense weights inputs are
taken as they are. A row's result is the same bits in any batch. The formulas of a cell stand in
`csrc/cpu/gemm.inl` and `csrc/cpu/dense.inl`.

Legend: T tokens, S sampled tokens, H heads, I inputs, O outputs, V vocabulary, M model features.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.activations import QUANTISED_ROWS, Activations, QuantisedRows
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.ops.gemm import HeadMatrices
from tokenspeed.kernels.registry import ANY, Priority, kernel
from tokenspeed.kernels.weights import (
    PACKED,
    PACKED_GROUPS,
    PANELS,
    Matrix,
    PackedGroups,
    PackedWeight,
)

__all__ = ["heads", "linear", "linear_dense", "linear_groups", "logits", "logits_dense", "lookup"]

_CPU = Capability(device="cpu")


@kernel(
    "gemm.linear",
    solution="cpu",
    requires=_CPU,
    formats=(PACKED,),
    traits={"bias": ANY},
    priority=Priority.NATIVE,
    reads=(QUANTISED_ROWS,),
)
def linear(
    x_TI: Activations, weight_OI: Matrix, bias_O: torch.Tensor | None, *, runtime: CpuRuntime
) -> torch.Tensor:
    """Rounded once, to the type of x: float32 or bfloat16. Rows that are not quantised will be."""
    return _product(x_TI, weight_OI, bias_O, x_TI.dtype, runtime)


@kernel(
    "gemm.linear",
    solution="cpu",
    requires=_CPU,
    formats=PANELS,
    traits={"bias": ANY},
    priority=Priority.NATIVE,
)
def linear_dense(
    x_TI: torch.Tensor, weight_OI: Matrix, bias_O: torch.Tensor | None, *, runtime: CpuRuntime
) -> torch.Tensor:
    """Rounded once, to the type of x, which is the weight's."""
    return _product(x_TI, weight_OI, bias_O, x_TI.dtype, runtime)


@kernel(
    "gemm.linear",
    solution="cpu",
    requires=_CPU,
    formats=(PACKED_GROUPS,),
    traits={"bias": ANY},
    priority=Priority.NATIVE,
)
def linear_groups(
    x_TI: torch.Tensor, weight_OI: Matrix, bias_O: torch.Tensor | None, *, runtime: CpuRuntime
) -> torch.Tensor:
    """As `linear` and `linear_dense`, of outputs each whose weights lie so."""
    assert isinstance(weight_OI, PackedGroups)
    y_TO = x_TI.new_empty((len(x_TI), weight_OI.shape[0]))
    for rows, matrices in weight_OI.runs:
        bias = None if bias_O is None else bias_O[rows]
        _cpu.linear(runtime, x_TI, matrices, bias, y_TO[:, rows])
    return y_TO


@kernel("gemm.heads", solution="cpu", requires=_CPU, formats=PANELS, priority=Priority.NATIVE)
def heads(x_THI: torch.Tensor, weight_HOI: HeadMatrices, *, runtime: CpuRuntime) -> torch.Tensor:
    """One product a head, each as `linear_dense` makes it."""
    assert not isinstance(weight_HOI, torch.Tensor)
    y_THO = x_THI.new_empty((*x_THI.shape[:2], weight_HOI[0].shape[0]))
    for head, weight_OI in enumerate(weight_HOI):
        _cpu.linear(runtime, x_THI[:, head], weight_OI.matrices, None, y_THO[:, head])
    return y_THO


@kernel(
    "gemm.logits",
    solution="cpu",
    requires=_CPU,
    formats=(PACKED,),
    priority=Priority.NATIVE,
    reads=(QUANTISED_ROWS,),
)
def logits(x_SI: Activations, weight_VI: Matrix, *, runtime: CpuRuntime) -> torch.Tensor:
    """float32 whatever the type of x. Rows that are not quantised will be."""
    return _product(x_SI, weight_VI, None, torch.float32, runtime)


@kernel("gemm.logits", solution="cpu", requires=_CPU, formats=PANELS, priority=Priority.NATIVE)
def logits_dense(x_SI: torch.Tensor, weight_VI: Matrix, *, runtime: CpuRuntime) -> torch.Tensor:
    """float32 whatever the type of x, which is the weight's."""
    return _product(x_SI, weight_VI, None, torch.float32, runtime)


def _product(
    x_TI: Activations,
    weight_OI: Matrix,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
    runtime: CpuRuntime,
) -> torch.Tensor:
    assert isinstance(weight_OI, PackedWeight)
    y_TO = torch.empty((len(x_TI), weight_OI.shape[0]), dtype=dtype)
    rows_TI = x_TI.memory if isinstance(x_TI, QuantisedRows) else x_TI
    _cpu.linear(runtime, rows_TI, weight_OI.matrices, bias_O, y_TO)
    return y_TO


@kernel(
    "embedding.lookup",
    solution="cpu",
    requires=_CPU,
    formats=(PACKED, *PANELS),
    priority=Priority.NATIVE,
)
def lookup(
    token_ids_T: torch.Tensor,
    table_VM: Matrix,
    scale: float = 1.0,
    first: int | None = None,
    *,
    runtime: CpuRuntime,
) -> torch.Tensor:
    """The rows of the table, dequantised."""
    assert isinstance(table_VM, PackedWeight)
    (table,) = table_VM.matrices
    x_TM = torch.empty((len(token_ids_T), table_VM.shape[1]))
    _cpu.lookup(runtime, token_ids_T, table, scale, x_TM, first)
    return x_TM
