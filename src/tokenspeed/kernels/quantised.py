"""Matrices of quantised checkpoints: as they are read, and as kernels on GPUs hold them.

Legend: O outputs, I inputs, G groups of inputs, B blocks of outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeAlias, runtime_checkable

import torch

from tokenspeed.core.errors import KernelError

__all__ = [
    "FLOAT8_BLOCKS",
    "INT4_GROUPS",
    "QUANTISED",
    "Float8Blocks",
    "Int4Groups",
    "QuantisedMatrix",
    "QuantisedStored",
    "QuantisedWeight",
]

FLOAT8_BLOCKS: Final = "float8_blocks"
"""The name of the format of `QuantisedWeight`s whose parts are `Float8Blocks`."""

INT4_GROUPS: Final = "int4_groups"
"""The same of `Int4Groups`."""

QUANTISED: Final = (FLOAT8_BLOCKS, INT4_GROUPS)
"""Formats of `QuantisedWeight`s."""

# Inputs that a kernel multiplies at once, which must share their scales.
_STEPS = (128, 64, 32)
_INT4_MIDDLE = 8


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

    def stacked(self, below: "Float8Blocks") -> "Float8Blocks | None":
        """One matrix of this one's outputs and another's; None where they do not fit."""
        if self.group != below.group:
            return None
        return replace(
            self,
            values_OI=torch.cat(
                [values_OI.view(torch.uint8) for values_OI in (self.values_OI, below.values_OI)]
            ).view(self.values_OI.dtype),
            scales_BG=torch.cat((self.scales_BG, below.scales_BG)),
            blocks_O=torch.cat((self.blocks_O, below.blocks_O + len(self.scales_BG))),
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
        assert self.step is not None
        halves = self.numbers.reshape(len(self.numbers), -1, 2, self.step // 2)
        numbers = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
        return replace(self, numbers=numbers, is_packed=True)

    def stacked(self, below: "Int4Groups") -> "Int4Groups | None":
        """One matrix of this one's outputs and another's; None where they do not fit."""
        alike = self.group == below.group and self.scales_OG.dtype == below.scales_OG.dtype
        if not alike or (self.zeros_OG is None) != (below.zeros_OG is None):
            return None
        zeros_OG = None
        if self.zeros_OG is not None and below.zeros_OG is not None:
            zeros_OG = torch.cat((self.zeros_OG, below.zeros_OG))
        return replace(
            self,
            numbers=torch.cat((self.numbers, below.numbers)),
            scales_OG=torch.cat((self.scales_OG, below.scales_OG)),
            zeros_OG=zeros_OG,
        )

    def _apart(self) -> torch.Tensor:
        if not self.is_packed:
            return self.numbers
        assert self.step is not None
        of_step = self.numbers.view(len(self.numbers), -1, self.step // 2)
        return torch.stack((of_step & 15, of_step >> 4), dim=2).flatten(1)


QuantisedMatrix: TypeAlias = Float8Blocks | Int4Groups
"""A matrix [O, I] of a quantised checkpoint."""


@runtime_checkable
class QuantisedStored(Protocol):
    """A `Stored` whose numbers can be had as they are, too."""

    def quantised(self, index: tuple[slice, ...], /) -> QuantisedMatrix | None:
        """first:end of each dimension; None where a group of inputs would be cut."""


class QuantisedWeight:
    """A matrix [O, I] in a device's memory, whose outputs are parts stacked upon each other.

    Checkpoints leave some matrices as they were, and some have groups that no kernel reads: such
    parts are dense. Neighbours of one kind become one, so that one launch serves them.

    Args:
        shape: (O, I).
        format_name: one of `QUANTISED`.
        parts: outputs of each part; they sum to O.
        dtype: element type of dense parts.
        device: where they lie.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        format_name: str,
        parts: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert sum(parts) == shape[0]
        self.shape = shape
        self.format_name = format_name
        self._parts = tuple(parts)
        self._dtype = dtype
        self._device = device
        self._loaded: dict[int, QuantisedMatrix | torch.Tensor] = {}
        self._matrices: tuple[QuantisedMatrix | torch.Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the parts loaded so far."""
        held = self._matrices or tuple(self._loaded.values())
        return sum(matrix.nbytes for matrix in held)

    @property
    def matrices(self) -> tuple[QuantisedMatrix | torch.Tensor, ...]:
        """What outputs are made with, from the first on, for a kernel.

        Raises:
            KernelError: a part was never loaded.
        """
        if not self._matrices:
            raise KernelError("a quantised weight is used before all of its parts were loaded")
        return self._matrices

    def pack(self, part: int, matrix: QuantisedMatrix) -> None:
        """Load one part as it is, or dense where no kernel reads its groups.

        Args:
            part: which one.
            matrix: not packed.
        """
        if matrix.step is None:
            self.pack_dense(part, matrix.to_float())
            return
        assert matrix.shape == (self._parts[part], self.shape[1])
        self._take(part, matrix.packed().to(self._device))

    def pack_dense(self, part: int, values_OI: torch.Tensor) -> None:
        """Load one part of values of any element type."""
        assert values_OI.shape == (self._parts[part], self.shape[1])
        self._take(part, values_OI.to(device=self._device, dtype=self._dtype))

    def to(self, device: torch.device) -> "QuantisedWeight":
        """A copy elsewhere."""
        copy = QuantisedWeight(
            self.shape,
            format_name=self.format_name,
            parts=self._parts,
            dtype=self._dtype,
            device=device,
        )
        copy._matrices = tuple(matrix.to(device) for matrix in self.matrices)
        return copy

    def _take(self, part: int, matrix: QuantisedMatrix | torch.Tensor) -> None:
        self._loaded[part] = matrix
        if len(self._loaded) < len(self._parts):
            return
        done: list[QuantisedMatrix | torch.Tensor] = []
        for index in range(len(self._parts)):
            below = self._loaded.pop(index)
            joined = _stacked(done[-1], below) if done else None
            if joined is None:
                done.append(below)
            else:
                done[-1] = joined
        self._matrices = tuple(done)


def _stacked(
    above: QuantisedMatrix | torch.Tensor, below: QuantisedMatrix | torch.Tensor
) -> QuantisedMatrix | torch.Tensor | None:
    if isinstance(above, torch.Tensor) and isinstance(below, torch.Tensor):
        return torch.cat((above, below))
    if isinstance(above, Int4Groups) and isinstance(below, Int4Groups):
        return above.stacked(below)
    if isinstance(above, Float8Blocks) and isinstance(below, Float8Blocks):
        return above.stacked(below)
    return None
