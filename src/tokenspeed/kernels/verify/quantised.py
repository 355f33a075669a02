"""Products with weights as quantised checkpoints have them.

Legend: T tokens, I inputs, O outputs, G groups of inputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.quantised import (
    FLOAT4_GROUP,
    FLOAT8_BLOCKS,
    INT4_GROUPS,
    Float4Groups,
    Float8Blocks,
    Int4Groups,
    QuantisedMatrix,
)
from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.verify.case import HALF_TYPES, Call, Case, Compared, compare, named, noise
from tokenspeed.kernels.weights import PACKED_GROUPS, PackedGroups

__all__ = ["linear_cases", "random_float4", "random_float8", "random_int4"]

# Tokens, inputs, and outputs of each part.
_SIZES = (
    (1, 128, (16,)),
    (3, 256, (33, 7)),
    (17, 384, (48,)),
    (70, 256, (129,)),
)
_DENSE_OUTPUTS = 5
_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """How numbers lie, and whether a dense part is below them."""

    format_name: str
    group: int
    zeros: bool = False
    dense: bool = False

    def __str__(self) -> str:
        zeros = ", zero points" if self.zeros else ""
        return f"groups of {self.group}{zeros}{', a dense part' if self.dense else ''}"

    def matrix(self, outputs: int, inputs: int, seed: int) -> QuantisedMatrix:
        """A random one."""
        if self.format_name == FLOAT8_BLOCKS:
            return random_float8(outputs, inputs, seed=seed)
        return random_int4(outputs, inputs, self.group, zeros=self.zeros, seed=seed)


_KINDS = (
    _Kind(format_name=INT4_GROUPS, group=32),
    _Kind(format_name=INT4_GROUPS, group=64, zeros=True),
    _Kind(format_name=INT4_GROUPS, group=128, dense=True),
    _Kind(format_name=INT4_GROUPS, group=128, zeros=True),
    _Kind(format_name=PACKED_GROUPS, group=32),
    _Kind(format_name=PACKED_GROUPS, group=64, zeros=True, dense=True),
    _Kind(format_name=PACKED_GROUPS, group=128, zeros=True),
    _Kind(format_name=FLOAT8_BLOCKS, group=_BLOCK),
    _Kind(format_name=FLOAT8_BLOCKS, group=_BLOCK, dense=True),
)


def random_int4(outputs: int, inputs: int, group: int, *, zeros: bool, seed: int = 0) -> Int4Groups:
    """Numbers of all four bits, scales of either sign; zeros up to the 16 that GPTQ has."""
    generator = torch.Generator().manual_seed(seed)
    shape = (outputs, inputs // group)
    numbers = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator)
    found = torch.randint(0, 17, shape, dtype=torch.uint8, generator=generator)
    return Int4Groups(
        numbers=numbers,
        scales_OG=torch.randn(shape, generator=generator).mul_(0.05).half(),
        zeros_OG=found if zeros else None,
        group=group,
    )


def random_float4(outputs: int, inputs: int, *, seed: int = 0) -> Float4Groups:
    """Numbers of all sixteen kinds, scales of some powers of two."""
    generator = torch.Generator().manual_seed(seed)
    shape = (outputs, inputs // FLOAT4_GROUP)
    return Float4Groups(
        numbers=torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator),
        powers_OG=torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator),
    )


def random_float8(outputs: int, inputs: int, *, seed: int = 0) -> Float8Blocks:
    """Normal values in blocks of 128 x 128, the last of which are smaller."""
    generator = torch.Generator().manual_seed(seed)
    values_OI = torch.randn(outputs, inputs, generator=generator).mul_(60).clamp_(-448, 448)
    shape = (-(-outputs // _BLOCK), -(-inputs // _BLOCK))
    return Float8Blocks(
        values_OI=values_OI.to(torch.float8_e4m3fn),
        scales_BG=torch.rand(shape, generator=generator).add_(0.1).mul_(1e-3),
        blocks_O=(torch.arange(outputs) // _BLOCK).int(),
        group=_BLOCK,
    )


def linear_cases() -> Iterator[Case]:
    """One part and several, with and without bias; FP8 with fewer inputs than blocks have."""
    for kind in _KINDS:
        for tokens, inputs, parts in _SIZES:
            halves = (torch.bfloat16,) if kind.format_name == PACKED_GROUPS else HALF_TYPES
            for dtype in (torch.float32, *halves):
                inputs_of = inputs - 48 * (kind.format_name == FLOAT8_BLOCKS)
                yield Case(
                    op="gemm.linear",
                    format_name=kind.format_name,
                    dtype=dtype,
                    name=f"{tokens} x {inputs_of} x {sum(parts)}, {kind}, {named(dtype)}",
                    traits={"bias": len(parts) > 1},
                    check=partial(_linear, kind, (tokens, inputs_of, parts), dtype),
                )


def _linear(
    kind: _Kind,
    sizes: tuple[int, int, tuple[int, ...]],
    dtype: torch.dtype,
    kernel: Call,
    runtime: CpuRuntime,
) -> Iterator[Compared]:
    tokens, inputs, parts = sizes
    counts = (*parts, *((_DENSE_OUTPUTS,) if kind.dense else ()))
    shape = (sum(counts), inputs)
    weight_OI: PackedGroups | QuantisedWeight
    if kind.format_name == PACKED_GROUPS:
        weight_OI = PackedGroups(shape, parts=counts, dtype=dtype, runtime=runtime)
    else:
        weight_OI = QuantisedWeight(
            shape,
            format_name=kind.format_name,
            parts=counts,
            dtype=dtype,
            device=torch.device("cpu"),
        )
    values = []
    for index, outputs in enumerate(parts):
        matrix = kind.matrix(outputs, inputs, index)
        weight_OI.pack(index, matrix)
        values.append(matrix.to_float().double())
    if kind.dense:
        dense_OI = noise(_DENSE_OUTPUTS, inputs, dtype=dtype, seed=3) * 0.05
        weight_OI.pack_dense(len(parts), dense_OI)
        values.append(dense_OI.double())
    values_OI = torch.cat(values)
    x_TI = noise(tokens, inputs + 3, dtype=dtype)[:, 3:]
    bias_O = noise(sum(counts), dtype=dtype, seed=2) if len(parts) > 1 else None
    exact_TO = x_TI.double() @ values_OI.T
    if bias_O is not None:
        exact_TO += bias_O.double()
    yield compare("y", kernel(x_TI, weight_OI, bias_O), exact_TO, dtype)
