"""Symbolic tensors: what a model's forward works on while its dataflow is found out.

A symbol has the shape that a tensor has on one rank, with tokens left open, and knows which cells
of the mesh divide which of its dimensions. It offers what models do with tensors between modules;
anything else is an error, because the compiler would not know how the result lies.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch

__all__ = ["Dim", "Flow", "Recorder", "Symbol", "cat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dim:
    """One dimension of a symbol.

    Attributes:
        size: elements on this rank; where there is a symbol, how many for each of it.
        symbol: "T" for tokens of the step, "S" for sampled ones, None for neither.
        cells: cells of the mesh that divide it, the outermost first. Not those that divide tokens,
            which the compiler chooses later.
        sizes: of each stacked piece, the elements that each rank of those cells has.
        index: which of those ranks this one is.
        overlapping: whether some of them hold the same elements.
    """

    size: int
    symbol: str | None = None
    cells: tuple[int, ...] = ()
    sizes: tuple[tuple[int, ...], ...] = ()
    index: int = 0
    overlapping: bool = False

    def scaled(self, times: int, over: int = 1) -> "Dim":
        """As it is when its elements are taken in groups, or each becomes several."""
        return replace(
            self,
            size=self.size * times // over,
            sizes=tuple(tuple(size * times // over for size in piece) for piece in self.sizes),
        )

    @property
    def whole(self) -> "Dim":
        """The dimension when its shares are put together."""
        return Dim(size=sum(map(sum, self.sizes)), symbol=self.symbol)

    def __str__(self) -> str:
        if self.symbol is None:
            return str(self.size)
        return self.symbol if self.size == 1 else f"{self.size}{self.symbol}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """How an op carries over what its inputs are.

    Attributes:
        name: of the op, for people.
        sums: inputs in which the op is linear together, so that sums over ranks may come after it:
            all of them are partial sums, or none.
        factors: inputs in each of which the op is linear alone: one may be a partial sum.
        mixes_tokens: whether tokens meet, or are picked by their place in the batch, so that each
            rank needs all of them.
        makes_partial: cells over which the result is a sum.
        makes_softmax: cells over which it is parts of a softmax.
        parts: inputs which may be parts of a softmax, as then the result is: of each mean the op is
            a linear function, and logarithms of sums it leaves.
    """

    name: str
    sums: frozenset[int] = frozenset()
    factors: frozenset[int] = frozenset()
    mixes_tokens: bool = False
    makes_partial: frozenset[int] = frozenset()
    makes_softmax: frozenset[int] = frozenset()
    parts: frozenset[int] = frozenset()


class Recorder(Protocol):
    """Takes down what is done with symbols."""

    def record(
        self, flow: Flow, inputs: Sequence["Symbol"], outputs: Iterable[tuple[Any, torch.dtype]]
    ) -> list["Symbol"]:
        """An op over inputs; gives symbols of the outputs' dimensions and types."""

    def fail(self, message: str) -> NoReturn:
        """Raise a PlacementError that says in which module."""


_ALL = slice(None)


class Symbol:
    """A tensor of a dataflow. Made by a `Recorder`.

    Attributes:
        dims: its dimensions.
        dtype: its element type.
        number: tells it from all other symbols of the trace.
        source: the module it comes out of, for people.
    """

    def __init__(
        self, recorder: Recorder, dims: Sequence[Dim], dtype: torch.dtype, number: int, source: str
    ) -> None:
        self.dims = tuple(dims)
        self.dtype = dtype
        self.number = number
        self.source = source
        self._recorder = recorder

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Its dimensions."""
        return self.dims

    @property
    def cells(self) -> frozenset[int]:
        """Cells that divide any dimension."""
        return frozenset(cell for dim in self.dims for cell in dim.cells)

    def per_symbol(self) -> tuple[str | None, int]:
        """Bytes on this rank, for each token or sampled token where the shape has them."""
        symbols = [dim.symbol for dim in self.dims if dim.symbol is not None]
        assert len(symbols) <= 1
        size_bytes = math.prod(dim.size for dim in self.dims) * self.dtype.itemsize
        return (symbols[0] if symbols else None), size_bytes

    def _unary(self, name: str, dims: Sequence[Dim], dtype: torch.dtype | None = None) -> "Symbol":
        flow = Flow(name=name, sums=frozenset({0}))
        (made,) = self._recorder.record(flow, (self,), [(dims, dtype or self.dtype)])
        return made

    def unflatten(self, dim: int, sizes: Sequence[int]) -> "Symbol":
        """Split a dimension in two; the outer one is divided as it was."""
        dim %= len(self.dims)
        old = self.dims[dim]
        known = math.prod(size for size in sizes if size != -1)
        whole = [old.size // known if size == -1 else size for size in sizes]
        inner = math.prod(whole[1:])
        uneven = [size for piece in old.sizes for size in piece if size % inner]
        if math.prod(whole) != old.size or uneven or -1 in sizes[1:]:
            self._recorder.fail(f"a dimension of {old} cannot be unflattened to {list(sizes)}")
        dims = [old.scaled(1, inner), *(Dim(size=size) for size in whole[1:])]
        return self._unary("unflatten", [*self.dims[:dim], *dims, *self.dims[dim + 1 :]])

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> "Symbol":
        """Merge dimensions, of which only the first may be divided."""
        start, end = start_dim % len(self.dims), end_dim % len(self.dims)
        first, *inner = self.dims[start : end + 1]
        if any(dim.cells or dim.symbol for dim in inner):
            self._recorder.fail("flatten merges a divided dimension into the one before it")
        merged = first.scaled(math.prod(dim.size for dim in inner))
        return self._unary("flatten", [*self.dims[:start], merged, *self.dims[end + 1 :]])

    def float(self) -> "Symbol":
        """The same in float32."""
        return self.to(torch.float32)

    def to(self, dtype: torch.dtype) -> "Symbol":
        """The same in another type."""
        return self._unary("to", self.dims, dtype)

    def __getitem__(self, index: Any) -> "Symbol":
        if isinstance(index, Symbol):
            dims = [index.dims[0], *self.dims[1:]]
            flow = Flow(name="indexing", sums=frozenset({0}), mixes_tokens=True)
            (made,) = self._recorder.record(flow, (self, index), [(dims, self.dtype)])
            return made
        indices = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in indices:
            place = indices.index(Ellipsis)
            missing = len(self.dims) - (len(indices) - 1)
            indices[place : place + 1] = [_ALL] * missing
        dims = list(self.dims)
        for place, item in enumerate(indices):
            if not isinstance(item, slice) or item.step is not None or place >= len(dims):
                self._recorder.fail(f"indexing with {item!r}, for which there is no rule")
            if item != _ALL:
                dims[place] = self._sliced(dims[place], item)
        return self._unary("slicing", dims)

    def split(self, sizes: Sequence[int], dim: int = 0) -> tuple["Symbol", ...]:
        """Pieces of given sizes along a dimension."""
        dim %= len(self.dims)
        ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        lead = (_ALL,) * dim
        return tuple(
            self[(*lead, slice(end - size, end))] for size, end in zip(sizes, ends, strict=True)
        )

    def _sliced(self, dim: Dim, item: slice) -> Dim:
        if dim.symbol is not None:
            self._recorder.fail("a slice of tokens: which of them a rank has is not known here")
        start, stop, _ = item.indices(dim.size)
        if not dim.cells:
            return Dim(size=max(0, stop - start))
        # A divided dimension is stacked pieces, each divided by itself: only whole ones can be
        # taken, for elsewhere the ranks' slices would not add up to a slice of the whole.
        ends = [0]
        for piece in dim.sizes:
            ends.append(ends[-1] + piece[dim.index])
        if start not in ends or stop not in ends:
            self._recorder.fail(
                f"a slice {start}:{stop} through a dimension that is divided over ranks; its "
                f"pieces end at {ends[1:]}"
            )
        pieces = dim.sizes[ends.index(start) : ends.index(stop)]
        return replace(dim, size=stop - start, sizes=pieces)

    def __add__(self, other: Any) -> "Symbol":
        return self._binary(Flow(name="addition", sums=frozenset({0, 1})), other)

    __radd__ = __add__

    def __mul__(self, other: Any) -> "Symbol":
        if isinstance(other, int | float):
            return self._unary("scaling", self.dims)
        # A product of two sums over ranks is not the sum of their products.
        return self._binary(Flow(name="multiplication", factors=frozenset({0, 1})), other)

    __rmul__ = __mul__

    def _binary(self, flow: Flow, other: Any) -> "Symbol":
        if not isinstance(other, Symbol):
            self._recorder.fail(f"{flow.name} of a tensor and {type(other).__name__}")
        dims = []
        one = Dim(size=1)
        for mine, theirs in zip(self.dims, other.dims, strict=False):
            if one not in (mine, theirs) and mine != theirs:
                break
            dims.append(theirs if mine == one else mine)
        if not len(dims) == len(self.dims) == len(other.dims):
            self._recorder.fail(
                f"{flow.name} of {_shape(self)} and {_shape(other)}, which lie differently: they "
                f"come from {self.source} and {other.source}"
            )
        dtype = torch.promote_types(self.dtype, other.dtype)
        (made,) = self._recorder.record(flow, (self, other), [(dims, dtype)])
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.cat:
            return cat(*args, **(kwargs or {}))
        symbol = next(arg for arg in args if isinstance(arg, Symbol))
        return symbol._recorder.fail(f"torch.{func.__name__}, for which there is no rule")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._recorder.fail(f"Tensor.{name}, for which there is no rule")


def cat(symbols: Sequence[Symbol], dim: int = 0) -> Symbol:
    """Symbols put together along a dimension, which all have whole or divided alike."""
    first = symbols[0]
    dim %= len(first.dims)
    recorder = first._recorder
    pieces = [symbol.dims[dim] for symbol in symbols]
    others = [symbol.dims[:dim] + symbol.dims[dim + 1 :] for symbol in symbols]
    if any(other != others[0] for other in others) or any(piece.symbol for piece in pieces):
        recorder.fail(f"cat of {', '.join(map(_shape, symbols))}, which lie differently")
    if len({(piece.cells, piece.index) for piece in pieces}) > 1:
        recorder.fail("cat of a divided dimension and one that is whole")
    joined = replace(
        pieces[0],
        size=sum(piece.size for piece in pieces),
        sizes=tuple(size for piece in pieces for size in piece.sizes),
        overlapping=any(piece.overlapping for piece in pieces),
    )
    dims = [*first.dims[:dim], joined, *first.dims[dim + 1 :]]
    flow = Flow(name="cat", sums=frozenset(range(len(symbols))))
    (made,) = recorder.record(flow, symbols, [(dims, first.dtype)])
    return made


def _shape(symbol: Symbol) -> str:
    return "[" + ", ".join(map(str, symbol.dims)) + "]"
