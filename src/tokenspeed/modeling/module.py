"""Modules: named parts of a model that hold weights and compute a `forward`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch

from tokenspeed.core.errors import KernelError
from tokenspeed.kernels import (
    PACKED,
    PACKED_GROUPS,
    PANELS,
    QUANTISED,
    BlockMatrix,
    KernelSelector,
    Matrix,
    PackedGroups,
    PackedWeight,
    QuantisedStored,
    QuantisedWeight,
    Stored,
)
from tokenspeed.modeling.cut import Cut, Division
from tokenspeed.modeling.placement import Boundary

__all__ = ["Module", "Weight"]


class Weight:
    """A tensor that a module owns: declared when the module is made, filled from a checkpoint.

    Between the two it may be placed: then it holds one rank's share. It lies on what was torch's
    default device when it was declared, which `build_model` sets for as long as it builds; memory
    is taken when `data` is first asked for.

    Args:
        shape: sizes of the whole.
        dims: what each dimension is, in words; no word twice.
        kernels: gives the element type.
        parts: sizes of named pieces stacked along the first dimension, where a checkpoint
            keeps as several tensors what one product reads at once.
        cuts: where ranks may divide a dimension, each part by itself; anywhere if not said.
        orders: of parts (None for the whole), in which order each group of rows is kept: entry i
            is the row of the checkpoint's group that becomes the i-th. Ranks divide whole groups.
        dtype: element type; None for the selector's.
        offset: added to what a checkpoint brings, of a vector.
        format_name: how it lies in memory, as the kernels that read it want it; None for a tensor
            of the selector's element type.

    Attributes:
        shape: sizes of the whole.
        local_shape: sizes of this rank's share.
        local_parts: sizes of its stacked pieces.
        local_first: the first row of the share, where the first dimension is divided as one piece.
        format_name: the name of its format.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        dims: tuple[str, ...],
        kernels: KernelSelector,
        parts: Mapping[str, int] | None = None,
        cuts: Mapping[str, Cut] | None = None,
        orders: Mapping[str | None, Sequence[int]] | None = None,
        dtype: torch.dtype | None = None,
        offset: float = 0.0,
        format_name: str | None = None,
    ) -> None:
        assert len(dims) == len(shape)
        assert parts is None or sum(parts.values()) == shape[0]
        assert set(cuts or ()) <= set(dims)
        self.dims = dims
        self.shape = self.local_shape = tuple(shape)
        self.format_name = format_name
        self._parts = dict(parts or {})
        self.local_parts = dict(self._parts)
        self.local_first: int | None = None
        self._cuts = dict(cuts or {})
        self._orders = dict(orders or {})
        self._dtype = dtype or kernels.dtype
        self._offset = offset
        self._divisions: dict[str, Division] = {}
        self._absent = False
        self._kernels = kernels
        self._device = torch.get_default_device()

    @cached_property
    def data(self) -> Matrix:
        """What a kernel takes as its weight."""
        if self.format_name == PACKED or self.format_name in PANELS:
            outputs, inputs = self.local_shape
            return PackedWeight(
                (outputs, inputs),
                parts=tuple(self.local_parts.values()) or (outputs,),
                dtype=self._kernels.dtype,
                runtime=self._kernels.runtime,
            )
        if self.format_name == PACKED_GROUPS:
            outputs, inputs = self.local_shape
            return PackedGroups(
                (outputs, inputs),
                parts=tuple(self.local_parts.values()) or (outputs,),
                dtype=self._kernels.dtype,
                runtime=self._kernels.runtime,
            )
        if self.format_name in QUANTISED:
            outputs, inputs = self.local_shape
            return QuantisedWeight(
                (outputs, inputs),
                format_name=self.format_name,
                parts=tuple(self.local_parts.values()) or (outputs,),
                dtype=self._kernels.dtype,
                device=self._device,
            )
        made = torch.zeros if self._absent else torch.empty
        return made(self.local_shape, dtype=self._dtype, device=self._device)

    @property
    def tensor(self) -> torch.Tensor:
        """The weight of an op that takes none but tensors."""
        assert not isinstance(self.data, PackedWeight | PackedGroups | QuantisedWeight)
        return self.data

    @property
    def size_bytes(self) -> int:
        """Bytes taken so far: of packed weights, by the parts that were loaded."""
        return self.data.nbytes

    @property
    def parts(self) -> tuple[str | None, ...]:
        """Names of what a checkpoint must bring: the stacked parts, or None for the whole."""
        return tuple(self._parts) or (None,)

    def part_shape(self, name: str | None) -> tuple[int, ...]:
        """Sizes of a part of the whole; None is all of it."""
        return self.shape if name is None else (self._parts[name], *self.shape[1:])

    def place(self, divisions: Mapping[str, Division], *, absent: bool = False) -> None:
        """Become one rank's share; to be called before memory is taken.

        Args:
            divisions: which share of each divided dimension.
            absent: whether the rank holds zeros instead, of what is added up over ranks but must
                count once: a bias of which another rank has the values.

        Raises:
            ConfigError: a dimension cannot be divided so.
        """
        assert not isinstance(vars(self).get("data"), Matrix)
        self._divisions = dict(divisions)
        self._absent = absent
        first, *others = range(len(self.shape))
        if self._parts:
            self.local_parts = {name: _extent(self._span(first, name)) for name in self._parts}
            size = sum(self.local_parts.values())
        else:
            span = self._span(first, None)
            size = _extent(span)
            self.local_first = span[0] if self.dims[first] in divisions else None
        self.local_shape = (size, *(_extent(self._span(dim, None)) for dim in others))

    def sizes(self, dim: str, shards: int) -> tuple[tuple[int, ...], ...]:
        """For each stacked part (one, if there is none), how much of `dim` each shard gets."""
        index = self.dims.index(dim)
        names = self.parts if index == 0 else (None,)
        return tuple(
            tuple(_extent(span) for span in self._spans(index, name, shards)) for name in names
        )

    def fill(self, name: str | None, stored: Stored) -> None:
        """Take this rank's share of a part of the right shape, in the format that `data` has.

        Raises:
            KernelError: the part is not of a type that can be packed.
            ConfigError: its blocks cannot be divided so.
        """
        if self._absent:
            return
        spans = [self._span(dim, name if dim == 0 else None) for dim in range(len(self.shape))]
        places = tuple(slice(*span) for span in spans)
        order = self._orders.get(name)
        index = 0 if name is None else list(self._parts).index(name)
        data = self.data
        if isinstance(data, QuantisedWeight | PackedGroups) and isinstance(stored, QuantisedStored):
            quantised = stored.quantised(places)
            if quantised is not None:
                if order:
                    rows_O = torch.arange(quantised.shape[0])
                    quantised = quantised.in_order(_in_order_rows(rows_O, order))
                data.pack(index, quantised)
                return
        value = stored[places]
        if order:
            value = _in_order(value, order)
        if self.format_name == PACKED:
            assert isinstance(self.data, PackedWeight)
            if isinstance(value, torch.Tensor):
                raise KernelError(
                    f"a matrix of {value.dtype} cannot be packed; "
                    "--kernel gemm.linear=reference keeps it as it is"
                )
            self.data.pack(index, value.quant_name, value.blocks)
            return
        values = value if isinstance(value, torch.Tensor) else value.to_float()
        if not isinstance(self.data, torch.Tensor):
            self.data.pack_dense(index, values)
            return
        if self._offset:
            values = values.float() + self._offset
        start = sum(list(self.local_parts.values())[:index])
        self.data.narrow(0, start, len(values)).copy_(values)

    def _span(self, dim: int, part: str | None) -> tuple[int, int]:
        division = self._divisions.get(self.dims[dim])
        if division is None:
            return 0, self.part_shape(part)[dim]
        return self._spans(dim, part, division.shards)[division.index]

    def _spans(self, dim: int, part: str | None, shards: int) -> tuple[tuple[int, int], ...]:
        cut = self._cuts.get(self.dims[dim], Cut())
        what = f"{self.dims[dim]} of a weight" + (f" ({part})" if part else "")
        return cut.spans(self.part_shape(part)[dim], shards, part=part, what=what)


def _in_order(
    value: torch.Tensor | BlockMatrix, order: Sequence[int]
) -> torch.Tensor | BlockMatrix:
    if not isinstance(value, torch.Tensor):
        return value.with_rows(_in_order_rows(value.blocks, order))
    return _in_order_rows(value, order)


def _in_order_rows(rows: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    groups = rows.reshape(-1, len(order), *rows.shape[1:])
    return groups[:, list(order)].reshape(rows.shape)


def _extent(span: tuple[int, int]) -> int:
    return span[1] - span[0]


class Module:
    """A part of a model. Subclasses define `forward`; children and weights are attributes.

    Calling a module runs `forward`. The call is the seam where data crosses a boundary: between
    ranks, the compiler puts what turns data that comes into what the boundary asks for in front of
    a module's `forward`, where anything is to be done. With one rank nothing is.

    Attributes:
        boundary: how data lies on the way in and out.
        wide_inputs: parameters of `forward` that may come as float32 where they would else be of
            the model's type, because they are added to float32 at once: sums over ranks are then
            not rounded before.
        reads: formats in which a module takes its first input beside tensors, best first, for
            whoever computes it.
    """

    boundary: ClassVar[Boundary | None] = None
    wide_inputs: ClassVar[frozenset[str]] = frozenset()
    reads: tuple[str, ...] = ()
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def children(self) -> Iterator[tuple[str, "Module"]]:
        """Direct children by name; members of a tuple as `name.index`."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, tuple):
                for index, member in enumerate(value):
                    if isinstance(member, Module):
                        yield f"{name}.{index}", member

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """All weights by dotted name; one that modules share comes under each of its names."""
        for name, value in vars(self).items():
            if isinstance(value, Weight):
                yield name, value
        for name, child in self.children():
            for inner, weight in child.weights():
                yield f"{name}.{inner}", weight
