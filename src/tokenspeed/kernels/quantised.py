"""Matrices of quantised checkpoints: as they are read, and as kernels on GPUs hold them.

Legend: O outputs, I inputs, G groups of inputs, B blocks of outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeAlias, runtime_checkable

import torch

__all__ = [
    "FLOAT4_GROUP",
    "FLOAT4_GROUPS",
    "FLOAT4_VALUES",
    "FLOAT8_BLOCKS",
    "GROUP_MIN",
    "INT4_GROUPS",
    "QUANTISED",
    "Float4Groups",
    "Float8Blocks",
    "Int4Groups",
    "QuantisedMatrix",
    "QuantisedStored",
]

FLOAT8_BLOCKS: Final = "float8_blocks"
"""The name of the format of `QuantisedWeight`s whose parts are `Float8Blocks`."""

INT4_GROUPS: Final = "int4_groups"
"""The same of `Int4Groups`."""

FLOAT4_GROUPS: Final = "float4_groups"
"""The same of `Float4Groups`."""

QUANTISED: Final = (FLOAT8_BLOCKS, INT4_GROUPS, FLOAT4_GROUPS)
"""Formats of `QuantisedWeight`s."""

FLOAT4_VALUES: Final = tuple(
    sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
)
"""What the numbers of `Float4Groups` stand for."""

FLOAT4_GROUP: Final = 32
"""Inputs of them that share a scale."""

# Inputs that a kernel multiplies at once, which must share their scales.
_STEPS = (128, 64, 32)
GROUP_MIN: Final = _STEPS[-1]
"""Inputs of the smallest group that a kernel reads."""

_INT4_MIDDLE = 8
_E8M0_BIAS = 127


def _step_of(group: int) -> int | None:
    return next((step for step in _STEPS if group % step == 0), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8Blocks:
    """Values of float8_e4m3, with one scale for each block of outputs and inputs.

    Attributes:
        values_OI: float8_e4m3fn.
        scales_BG: float32, of block b of outputs and group g of inputs.
        blocks_O: int32, the block of each output.
        group: inputs of a block; the last one may be smaller.
    """

    values_OI: torch.Tensor
    scales_BG: torch.Tensor
    blocks_O: torch.Tensor
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.values_OI.shape[0], self.values_OI.shape[1]

    @property
    def step(self) -> int | None:
        """Inputs that are multiplied at once; None where kernels cannot."""
        return self.group if self.group in _STEPS else None

    def in_order(self, rows_O: torch.Tensor) -> "Float8Blocks":
        """Other rows, of int64 numbers."""
        values_OI = self.values_OI.view(torch.uint8)[rows_O].view(self.values_OI.dtype)
        return replace(self, values_OI=values_OI, blocks_O=self.blocks_O[rows_O])

    def to_float(self) -> torch.Tensor:
        """float32 [O, I]."""
        scales_OI = self.scales_BG[self.blocks_O.long()].repeat_interleave(self.group, 1)
        return self.values_OI.float() * scales_OI[:, : self.shape[1]]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.values_OI.nbytes + self.scales_BG.nbytes + self.blocks_O.nbytes

    def to(self, device: torch.device) -> "Float8Blocks":
        """A copy elsewhere, each tensor of it contiguous."""
        return replace(
            self,
            values_OI=self.values_OI.to(device).contiguous(),
            scales_BG=self.scales_BG.to(device).contiguous(),
            blocks_O=self.blocks_O.to(device).contiguous(),
        )

    def packed(self) -> "Float8Blocks":
        """As kernels read it, which is as it is."""
        return self

    def fits(self, other: "Float8Blocks") -> bool:
        """Whether one matrix may have the outputs of both."""
        return self.group == other.group

    @staticmethod
    def joined(parts: Sequence["Float8Blocks"]) -> "Float8Blocks":
        """One matrix of all outputs of matrices that fit."""
        first, *_ = parts
        blocks = []
        before = 0
        for part in parts:
            blocks.append(part.blocks_O + before)
            before += len(part.scales_BG)
        # Not every device puts such numbers together.
        numbers = torch.cat([part.values_OI.view(torch.uint8) for part in parts])
        return replace(
            first,
            values_OI=numbers.view(first.values_OI.dtype),
            scales_BG=torch.cat([part.scales_BG for part in parts]),
            blocks_O=torch.cat(blocks),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Groups:
    """Numbers from 0 to 15, less a number and times a scale for each group of inputs.

    Attributes:
        numbers: uint8 [O, I], or where they are packed [O, I / 2]: of each `step` inputs the first
            half in the lower bits, the other in the upper ones.
        scales_OG: a floating-point type.
        zeros_OG: uint8, what stands for zero, 0 to 16; None for 8.
        group: inputs of a group.
        is_packed: whether two numbers share a byte.
    """

    numbers: torch.Tensor
    scales_OG: torch.Tensor
    zeros_OG: torch.Tensor | None
    group: int
    is_packed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.numbers.shape[0], self.numbers.shape[1] * (2 if self.is_packed else 1)

    @property
    def step(self) -> int | None:
        """Inputs that are multiplied at once; None where kernels cannot."""
        return _step_of(self.group)

    def in_order(self, rows_O: torch.Tensor) -> "Int4Groups":
        """Other rows, of int64 numbers."""
        return replace(
            self,
            numbers=self.numbers[rows_O],
            scales_OG=self.scales_OG[rows_O],
            zeros_OG=None if self.zeros_OG is None else self.zeros_OG[rows_O],
        )

    def divided(self, groups_G: torch.Tensor, size: int) -> "Int4Groups":
        """The same numbers in smaller groups.

        Args:
            groups_G: int64: of each of them, which group's scale it has.
            size: inputs of each.
        """
        zeros_OG = None if self.zeros_OG is None else self.zeros_OG[:, groups_G]
        scales_OG = self.scales_OG[:, groups_G]
        return replace(self, scales_OG=scales_OG, zeros_OG=zeros_OG, group=size)

    def to_float(self) -> torch.Tensor:
        """float32 [O, I]."""
        zeros_OG = self.zeros_OG
        if zeros_OG is None:
            zeros_OG = torch.full_like(self.scales_OG, _INT4_MIDDLE, dtype=torch.uint8)
        numbers_OGX = self._apart().float().reshape(len(self.numbers), -1, self.group)
        return ((numbers_OGX - zeros_OG[..., None]) * self.scales_OG.float()[..., None]).flatten(1)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        zeros = 0 if self.zeros_OG is None else self.zeros_OG.nbytes
        return self.numbers.nbytes + self.scales_OG.nbytes + zeros

    def to(self, device: torch.device) -> "Int4Groups":
        """A copy elsewhere, each tensor of it contiguous."""
        zeros_OG = self.zeros_OG
        return replace(
            self,
            numbers=self.numbers.to(device).contiguous(),
            scales_OG=self.scales_OG.to(device).contiguous(),
            zeros_OG=None if zeros_OG is None else zeros_OG.to(device).contiguous(),
        )

    def packed(self) -> "Int4Groups":
        """As kernels read it."""
        assert not self.is_packed
        return replace(self, numbers=_two_a_byte(self.numbers, self.step), is_packed=True)

    def fits(self, other: "Int4Groups") -> bool:
        """Whether one matrix may have the outputs of both."""
        alike = self.group == other.group and self.scales_OG.dtype == other.scales_OG.dtype
        return alike and (self.zeros_OG is None) == (other.zeros_OG is None)

    @staticmethod
    def joined(parts: Sequence["Int4Groups"]) -> "Int4Groups":
        """One matrix of all outputs of matrices that fit."""
        first, *_ = parts
        zeros = [part.zeros_OG for part in parts if part.zeros_OG is not None]
        return replace(
            first,
            numbers=torch.cat([part.numbers for part in parts]),
            scales_OG=torch.cat([part.scales_OG for part in parts]),
            zeros_OG=torch.cat(zeros) if zeros else None,
        )

    def _apart(self) -> torch.Tensor:
        return _one_a_byte(self.numbers, self.step) if self.is_packed else self.numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Float4Groups:
    """Numbers of MXFP4 (OCP Microscaling Formats 1.0, 2023): e2m1, times a power of two for each 32
    inputs.

    Attributes:
        numbers: uint8 [O, I], 0 to 15: which of `FLOAT4_VALUES`; packed as those of `Int4Groups`.
        powers_OG: uint8, e8m0: exponents of two, plus 127.
        is_packed: whether two numbers share a byte.
    """

    numbers: torch.Tensor
    powers_OG: torch.Tensor
    is_packed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.numbers.shape[0], self.numbers.shape[1] * (2 if self.is_packed else 1)

    @property
    def group(self) -> int:
        """Inputs of a group."""
        return FLOAT4_GROUP

    @property
    def step(self) -> int | None:
        """Inputs that are multiplied at once: scales multiply numbers, and may be several."""
        return _step_of(self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.numbers.nbytes + self.powers_OG.nbytes

    def exponents(self) -> torch.Tensor:
        """int32 [O, G]: of two, of each group's scale."""
        return self.powers_OG.int() - _E8M0_BIAS

    def in_order(self, rows_O: torch.Tensor) -> "Float4Groups":
        """Other rows, of int64 numbers."""
        return replace(self, numbers=self.numbers[rows_O], powers_OG=self.powers_OG[rows_O])

    def to_float(self) -> torch.Tensor:
        """float32 [O, I]."""
        numbers = _one_a_byte(self.numbers, self.step) if self.is_packed else self.numbers
        table = torch.tensor(FLOAT4_VALUES, device=numbers.device)
        # Ten times as fast as indexing by a tensor.
        values = table.index_select(0, numbers.flatten().int())
        values_OGX = values.view(*self.powers_OG.shape, FLOAT4_GROUP)
        return torch.ldexp(values_OGX, self.exponents()[..., None]).flatten(1)

    def to(self, device: torch.device) -> "Float4Groups":
        """A copy elsewhere, each tensor of it contiguous."""
        return replace(
            self,
            numbers=self.numbers.to(device).contiguous(),
            powers_OG=self.powers_OG.to(device).contiguous(),
        )

    def packed(self) -> "Float4Groups":
        """As kernels read it."""
        assert not self.is_packed
        return replace(self, numbers=_two_a_byte(self.numbers, self.step), is_packed=True)

    def fits(self, other: "Float4Groups") -> bool:
        """Whether one matrix may have the outputs of both."""
        return self.step == other.step

    @staticmethod
    def joined(parts: Sequence["Float4Groups"]) -> "Float4Groups":
        """One matrix of all outputs of matrices that fit."""
        first, *_ = parts
        return replace(
            first,
            numbers=torch.cat([part.numbers for part in parts]),
            powers_OG=torch.cat([part.powers_OG for part in parts]),
        )


def _two_a_byte(numbers: torch.Tensor, step: int | None) -> torch.Tensor:
    """uint8 [O, I / 2] of [O, I]: of each `step` inputs the first half in the lower bits."""
    assert step is not None
    halves = numbers.reshape(len(numbers), -1, 2, step // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def _one_a_byte(numbers: torch.Tensor, step: int | None) -> torch.Tensor:
    """What `_two_a_byte` was given."""
    assert step is not None
    of_step = numbers.view(len(numbers), -1, step // 2)
    return torch.stack((of_step & 15, of_step >> 4), dim=2).flatten(1)


QuantisedMatrix: TypeAlias = Float8Blocks | Int4Groups | Float4Groups
"""A matrix [O, I] of a quantised checkpoint."""


@runtime_checkable
class QuantisedStored(Protocol):
    """A `Stored` whose numbers can be had as they are, too."""

    def quantised(self, index: tuple[slice, ...], /) -> QuantisedMatrix | None:
        """first:end of each dimension; None where a group of inputs is cut that cannot be."""
