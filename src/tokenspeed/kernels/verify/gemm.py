"""Products with weights and lookups: dense, in panels, and packed from every type of blocks.

Legend: T tokens, H heads, I inputs, O outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.ops.gemm import HeadMatrices
from tokenspeed.kernels.verify.blocks import BLOCK_TYPES, packed_weight
from tokenspeed.kernels.verify.case import (
    TYPES,
    Call,
    Case,
    Compared,
    compare,
    equal,
    named,
    noise,
)
from tokenspeed.kernels.weights import PACKED, PANELS, Matrix, PackedWeight

__all__ = ["heads_cases", "linear_cases", "logits_cases", "lookup_cases"]

# Tokens, inputs, outputs.
_DENSE = ((1, 1, 1), (1, 64, 48), (3, 7, 5), (8, 96, 33), (37, 61, 129))
_WIDE = (3, 1024, 5001)
# Outputs and inputs: below and above one panel of 16 outputs, and more than one block of inputs.
_PACKED = ((1, 256), (16, 512), (53, 768), (130, 2304))
_PACKED_TOKENS = (1, 3, 4, 5, 37)
_MIXTURE = (("Q5_0", 40), ("Q8_0", 24), ("Q6_K", 40))
_TABLE = ((1, 256), (19, 2304))

_Parts = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class _Product:
    """Sizes of a product, and its weight's format; a packed one has parts of types of blocks."""

    format_name: str
    parts: _Parts
    dtype: torch.dtype
    tokens: int
    inputs: int
    outputs: int

    def operands(self, runtime: CpuRuntime) -> tuple[torch.Tensor, Matrix, torch.Tensor]:
        """Activations, the weight as a kernel reads it, and its values in float64."""
        x_TI = noise(self.tokens, self.inputs, dtype=self.dtype)
        if self.format_name == PACKED:
            packed, values_OI = packed_weight(
                self.parts, self.inputs, dtype=self.dtype, runtime=runtime
            )
            return x_TI, packed, values_OI.double()
        values_OI = noise(self.outputs, self.inputs, dtype=self.dtype, seed=1)
        return x_TI, _dense(values_OI, self.format_name, runtime), values_OI.double()


def linear_cases() -> Iterator[Case]:
    """With and without bias, one token and many."""
    for name, dtype in _dense_formats():
        for tokens, inputs, outputs in _DENSE:
            for bias in (False, True):
                yield Case(
                    op="gemm.linear",
                    format_name=name,
                    dtype=dtype,
                    name=_sizes(tokens, inputs, outputs, dtype, bias=bias),
                    traits={"bias": bias},
                    check=partial(
                        _linear, _Product(name, (), dtype, tokens, inputs, outputs), bias
                    ),
                )
    for detail, parts, inputs in _packed_matrices():
        outputs = sum(count for _, count in parts)
        for index, tokens in enumerate(_PACKED_TOKENS):
            for dtype in (torch.float32, torch.bfloat16):
                bias = index % 2 == 0
                yield Case(
                    op="gemm.linear",
                    format_name=PACKED,
                    detail=detail,
                    dtype=dtype,
                    name=_sizes(tokens, inputs, outputs, dtype, bias=bias),
                    traits={"bias": bias},
                    check=partial(
                        _linear, _Product(PACKED, parts, dtype, tokens, inputs, outputs), bias
                    ),
                )


def heads_cases() -> Iterator[Case]:
    """Heads by themselves, and as parts of wider rows."""
    for name, dtype in _dense_formats():
        for tokens, inputs, outputs in _DENSE:
            for heads in (1, 3):
                yield Case(
                    op="gemm.heads",
                    format_name=name,
                    dtype=dtype,
                    name=f"{heads} of {_sizes(tokens, inputs, outputs, dtype)}",
                    check=partial(
                        _heads, _Product(name, (), dtype, tokens, inputs, outputs), heads
                    ),
                )


def logits_cases() -> Iterator[Case]:
    """Results are float32 whatever the activations are."""
    for name, dtype in _dense_formats():
        for tokens, inputs, outputs in (*_DENSE, _WIDE):
            yield Case(
                op="gemm.logits",
                format_name=name,
                dtype=dtype,
                name=_sizes(tokens, inputs, outputs, dtype),
                check=partial(_logits, _Product(name, (), dtype, tokens, inputs, outputs)),
            )
    for detail, parts, inputs in _packed_matrices():
        outputs = sum(count for _, count in parts)
        for tokens in (1, 5):
            for dtype in (torch.float32, torch.bfloat16):
                yield Case(
                    op="gemm.logits",
                    format_name=PACKED,
                    detail=detail,
                    dtype=dtype,
                    name=_sizes(tokens, inputs, outputs, dtype),
                    check=partial(_logits, _Product(PACKED, parts, dtype, tokens, inputs, outputs)),
                )


def lookup_cases() -> Iterator[Case]:
    """Rows of a table in any order, some twice; results are float32."""
    for rows, features in ((1, 1), (19, 5), (7, 96)):
        for name, dtype in _dense_formats():
            yield Case(
                op="embedding.lookup",
                format_name=name,
                dtype=dtype,
                name=f"{rows} x {features}",
                check=partial(_lookup, _Product(name, (), dtype, 2 * rows + 1, features, rows)),
            )
    for quant_name in BLOCK_TYPES:
        for rows, features in _TABLE:
            yield Case(
                op="embedding.lookup",
                format_name=PACKED,
                detail=quant_name,
                dtype=torch.float32,
                name=f"{rows} x {features}",
                check=partial(
                    _lookup,
                    _Product(
                        PACKED, ((quant_name, rows),), torch.float32, 2 * rows + 1, features, rows
                    ),
                ),
            )


def _dense_formats() -> Iterator[tuple[str, torch.dtype]]:
    for dtype in TYPES:
        yield named(dtype), dtype
        if f"{named(dtype)}_panels" in PANELS:
            yield f"{named(dtype)}_panels", dtype


def _packed_matrices() -> Iterator[tuple[str, _Parts, int]]:
    for quant_name in BLOCK_TYPES:
        for outputs, inputs in _PACKED:
            yield quant_name, ((quant_name, outputs),), inputs
    yield "mixed", _MIXTURE, 512


def _sizes(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = False
) -> str:
    added = ", bias" if bias else ""
    return f"{tokens} x {inputs} x {outputs}{added}, {named(dtype)}"


def _linear(of: _Product, bias: bool, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    x_TI, weight_OI, values_OI = of.operands(runtime)
    bias_O = noise(of.outputs, dtype=of.dtype, seed=2) if bias else None
    exact_TO = x_TI.double() @ values_OI.T
    if bias_O is not None:
        exact_TO += bias_O.double()
    y_TO = kernel(x_TI, weight_OI, bias_O)
    yield compare("y", y_TO, exact_TO, of.dtype, size=_size(x_TI, values_OI))


def _heads(of: _Product, heads: int, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    # The first elements of each head belong to something else.
    x_THI = noise(of.tokens, heads, of.inputs + 3, dtype=of.dtype)[..., 3:]
    values_HOI = noise(heads, of.outputs, of.inputs, dtype=of.dtype, seed=1)
    weight_HOI: HeadMatrices = values_HOI
    if of.format_name in PANELS:
        panels = [_dense(values_OI, of.format_name, runtime) for values_OI in values_HOI]
        weight_HOI = [weight for weight in panels if isinstance(weight, PackedWeight)]
    y_THO = kernel(x_THI, weight_HOI)
    for head in range(heads):
        x_TI, values_OI = x_THI[:, head], values_HOI[head].double()
        exact_TO = x_TI.double() @ values_OI.T
        yield compare("y", y_THO[:, head], exact_TO, of.dtype, size=_size(x_TI, values_OI))


def _logits(of: _Product, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    x_TI, weight_OI, values_OI = of.operands(runtime)
    exact_TO = x_TI.double() @ values_OI.T
    y_TO = kernel(x_TI, weight_OI)
    yield compare("logits", y_TO, exact_TO, torch.float32, size=_size(x_TI, values_OI))


def _size(x_TI: torch.Tensor, values_OI: torch.Tensor) -> torch.Tensor:
    """How large sums are whose terms have random signs.

    A sum may cancel to next to nothing, and what its terms are off by does not.
    """
    return (x_TI.double().square() @ values_OI.square().T).sqrt()


def _lookup(of: _Product, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    _, table, values_OI = of.operands(runtime)
    ids_T = torch.arange(of.tokens).mul_(5).remainder_(of.outputs)
    rows_TI = values_OI.float()[ids_T]
    yield equal("rows", kernel(ids_T, table), rows_TI)
    yield equal("scaled rows", kernel(ids_T, table, 25.298221), rows_TI * 25.298221)
    # A part of a table whose first row is the third: of those before and behind it nothing is held.
    held_T1 = ids_T[:, None] < of.outputs - 2
    of_part_TI = torch.where(held_T1, rows_TI, 0.0)
    held_ids_T = torch.where(held_T1[:, 0], ids_T + 2, ids_T - of.outputs + 2)
    yield equal("rows of a part", kernel(held_ids_T, table, 1.0, 2), of_part_TI)


def _dense(values_OI: torch.Tensor, format_name: str, runtime: CpuRuntime) -> Matrix:
    if format_name not in PANELS:
        return values_OI
    outputs, inputs = values_OI.shape
    weight = PackedWeight(
        (outputs, inputs), parts=(outputs,), dtype=values_OI.dtype, runtime=runtime
    )
    weight.pack_dense(0, values_OI)
    return weight
