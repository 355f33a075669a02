"""The weights of all experts of a layer that one product reads.

Legend: E experts, O outputs, I inputs.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from tokenspeed.kernels import (
    GROUPED,
    PACKED,
    PANELS,
    QUANTISED,
    KernelSelector,
    PackedGroups,
    PackedWeight,
    QuantisedStored,
    QuantisedWeight,
    Stored,
)
from tokenspeed.kernels.ops.moe import ExpertMatrices
from tokenspeed.kernels.quantised import QuantisedMatrix
from tokenspeed.modeling.cut import Cut, Division
from tokenspeed.modeling.module import Weight

__all__ = ["ExpertBias", "ExpertWeight", "StackedExpert"]


class ExpertWeight(Weight):
    """Matrices [O, I] of E experts, which checkpoints bring one by one.

    Ranks may divide the experts, and each expert's outputs or inputs. Parts are named by expert,
    `3`, or `3.gate` where an expert's matrix is stacked pieces.

    Args:
        experts: E.
        outputs: O.
        inputs: I.
        kernels: gives the element type.
        pieces: sizes of named pieces stacked along O.
        cut: where ranks may divide outputs or inputs.
        format_name: as of `Weight`.
    """

    def __init__(
        self,
        experts: int,
        outputs: int,
        inputs: int,
        *,
        kernels: KernelSelector,
        pieces: Mapping[str, int] | None = None,
        cut: Cut | None = None,
        format_name: str | None = None,
    ) -> None:
        assert pieces is None or sum(pieces.values()) == outputs
        super().__init__(
            (experts, outputs, inputs),
            dims=("experts", "outputs", "inputs"),
            kernels=kernels,
            cuts={"outputs": cut, "inputs": cut} if cut else {},
            format_name=format_name,
        )
        self._pieces = dict(pieces or {})
        self._local_pieces: dict[str | None, int] = (
            dict(pieces.items()) if pieces else {None: outputs}
        )

    @cached_property
    def data(self) -> Any:
        """What a kernel takes: `ExpertMatrices` of this rank's experts."""
        made: ExpertMatrices
        experts, outputs, inputs = self.local_shape
        if self.format_name in QUANTISED:
            # A kernel reads those of all experts at once.
            made = QuantisedWeight(
                (experts * outputs, inputs),
                format_name=self.format_name,
                parts=tuple(self._local_pieces.values()) * experts,
                dtype=self._kernels.dtype,
                device=self._device,
                uniform=True,
            )
        elif self.format_name in GROUPED:
            made = tuple(
                PackedGroups(
                    (outputs, inputs),
                    parts=tuple(self._local_pieces.values()),
                    dtype=self._kernels.dtype,
                    runtime=self._kernels.runtime,
                )
                for _ in range(experts)
            )
        elif self.format_name == PACKED or self.format_name in PANELS:
            made = tuple(
                PackedWeight(
                    (outputs, inputs),
                    parts=tuple(self._local_pieces.values()),
                    dtype=self._kernels.dtype,
                    runtime=self._kernels.runtime,
                )
                for _ in range(experts)
            )
        else:
            made = torch.empty(self.local_shape, dtype=self._kernels.dtype, device=self._device)
        return made

    @property
    def size_bytes(self) -> int:
        """Bytes taken so far."""
        data = self.data
        held = (data,) if isinstance(data, torch.Tensor | QuantisedWeight) else data
        return sum(matrix.nbytes for matrix in held)

    @property
    def parts(self) -> tuple[str | None, ...]:
        """Names of what a checkpoint must bring, of all experts wherever they are."""
        pieces = tuple(f".{piece}" for piece in self._pieces) or ("",)
        return tuple(f"{expert}{piece}" for expert in range(self.shape[0]) for piece in pieces)

    def part_shape(self, name: str | None) -> tuple[int, ...]:
        """Sizes of a part of the whole."""
        if name is None:
            return self.shape
        _, _, piece = name.partition(".")
        return (self._pieces[piece] if piece else self.shape[1], self.shape[2])

    def place(self, divisions: Mapping[str, Division], *, absent: bool = False) -> None:
        """Become one rank's share; see `Weight`."""
        super().place(divisions, absent=absent)
        for piece in self._local_pieces:
            first, end = self._piece_span(piece)
            self._local_pieces[piece] = end - first
        experts, _, inputs = self.local_shape
        self.local_shape = (experts, sum(self._local_pieces.values()), inputs)

    def fill(self, name: str | None, stored: Stored) -> None:
        """Take this rank's share of a part; of experts that others hold nothing is read."""
        assert name is not None
        expert, _, piece = name.partition(".")
        first, end = self._span(0, None)
        if not first <= int(expert) < end:
            return
        rows, inputs = self._piece_span(piece or None), self._span(2, None)
        places = (slice(*rows), slice(*inputs))
        index = list(self._local_pieces).index(piece or None)
        matrix = self.data
        if isinstance(matrix, QuantisedWeight):
            index += (int(expert) - first) * len(self._local_pieces)
        else:
            matrix = matrix[int(expert) - first]
        if isinstance(matrix, PackedGroups | QuantisedWeight) and isinstance(
            stored, QuantisedStored
        ):
            quantised = stored.quantised(places)
            if quantised is not None:
                matrix.pack(index, quantised)
                return
        value = stored[places]
        if self.format_name == PACKED and not isinstance(value, torch.Tensor):
            matrix.pack(index, value.quant_name, value.blocks)
            return
        values = value if isinstance(value, torch.Tensor) else value.to_float()
        if not isinstance(matrix, torch.Tensor):
            matrix.pack_dense(index, values)
            return
        start = sum(list(self._local_pieces.values())[:index])
        matrix.narrow(0, start, len(values)).copy_(values)

    def _piece_span(self, piece: str | None) -> tuple[int, int]:
        size = self.shape[1] if piece is None else self._pieces[piece]
        division = self._divisions.get("outputs")
        if division is None:
            return 0, size
        cut = self._cuts.get("outputs", Cut())
        what = "outputs of an expert" + (f" ({piece})" if piece else "")
        return cut.spans(size, division.shards, what=what)[division.index]


class ExpertBias(ExpertWeight):
    """What products of E experts add: vectors [O], which checkpoints bring one by one.

    Args:
        experts: E.
        outputs: O.
        kernels: gives the element type.
        pieces, cut: as of the products' weights.
    """

    def __init__(
        self,
        experts: int,
        outputs: int,
        *,
        kernels: KernelSelector,
        pieces: Mapping[str, int] | None = None,
        cut: Cut | None = None,
    ) -> None:
        super().__init__(experts, outputs, 1, kernels=kernels, pieces=pieces, cut=cut)

    @cached_property
    def data(self) -> Any:
        """What a kernel takes: a tensor [E, O] of this rank's experts."""
        made = torch.zeros if self._absent else torch.empty
        return made(self.local_shape[:2], dtype=self._kernels.dtype, device=self._device)

    def part_shape(self, name: str | None) -> tuple[int, ...]:
        """Sizes of a part of the whole."""
        shape = super().part_shape(name)
        return shape if name is None else shape[:1]

    def fill(self, name: str | None, stored: Stored) -> None:
        """Take this rank's share of a part."""
        assert name is not None
        expert, _, piece = name.partition(".")
        first, end = self._span(0, None)
        if self._absent or not first <= int(expert) < end:
            return
        values = stored[(slice(*self._piece_span(piece or None)),)]
        assert isinstance(values, torch.Tensor)
        index = list(self._local_pieces).index(piece or None)
        start = sum(list(self._local_pieces.values())[:index])
        self.data[int(expert) - first, start : start + len(values)].copy_(values)


class StackedExpert:
    """One expert's tensor of a checkpoint that has those of all experts in one, as a `Stored`.

    Args:
        stored: [E, O], or [E, I, O], which is [O, I] of each expert transposed.
        expert: which one.
        first, step: its outputs are those with numbers first, first + step and so on.
    """

    def __init__(self, stored: Stored, expert: int, *, first: int = 0, step: int = 1) -> None:
        self._stored = stored
        self._expert, self._first, self._step = expert, first, step
        _, *inputs, outputs = stored.shape
        self.shape = (len(range(first, outputs, step)), *inputs)

    def quantised(self, index: tuple[slice, ...]) -> QuantisedMatrix | None:
        """Numbers as they are, [O, I]; None where they are none, or a group would be cut."""
        if not isinstance(self._stored, QuantisedStored):
            return None
        found = self._stored.quantised(self._places(index))
        if found is None:
            return None
        return found.in_order(torch.arange(self._first, found.shape[0], self._step))

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        found = self._stored[self._places(index)]
        values = found if isinstance(found, torch.Tensor) else found.to_float()
        return values[0, ..., self._first :: self._step].movedim(-1, 0)

    def _places(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Of the tensor: this expert's outputs, with those that lie between."""
        outputs, *inputs = index or (slice(None),) * len(self.shape)
        first, end, _ = outputs.indices(self.shape[0])
        beside = slice(first * self._step, end * self._step)
        return (slice(self._expert, self._expert + 1), *inputs, beside)
