"""What takes a tensor from one way of lying over the ranks to another, and what it moves.

How a tensor lies along one cell of the mesh is a letter: R whole, P a partial sum, T a share of the
step's tokens, F a share of features (or heads, or vocabulary), L a part of a softmax, B the tokens
of a rank's own requests, which is where attention's `dp` starts from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from tokenspeed.distributed import Mesh
from tokenspeed.modeling.compiler.symbol import Symbol

__all__ = ["KINDS", "States", "Transition", "transitions_between"]

States = tuple[str, ...]

# In this order, so that what moves over a group is as small as it can be.
KINDS: Final = ("slice", "reduce_scatter", "all_to_all", "merge", "all_reduce", "all_gather")

_KIND_OF: Final = {
    ("R", "T"): "slice",
    ("R", "F"): "slice",
    ("R", "B"): "slice",
    ("P", "T"): "reduce_scatter",
    ("P", "F"): "reduce_scatter",
    ("P", "B"): "reduce_scatter",
    ("P", "R"): "all_reduce",
    ("L", "R"): "merge",
    ("T", "R"): "all_gather",
    ("F", "R"): "all_gather",
    ("B", "R"): "all_gather",
    ("T", "F"): "all_to_all",
    ("F", "T"): "all_to_all",
    ("B", "F"): "all_to_all",
    ("F", "B"): "all_to_all",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One collective, or a slice, over a group of ranks.

    Attributes:
        kind: one of `KINDS`.
        cells: the group's cells, the outermost first.
        split_dim: the dimension of which each rank keeps a share.
        join_dim: the dimension that is put together.
        sizes: elements of the joined or split features on each rank; None where they are tokens.
        symbol: what is counted at run time, "T" or "S", and how many there are of it in the
            tensor's first dimension; None if it has no such dimension.
        own_tokens: whether tokens are those of each rank's own requests.
        wide: whether a sum stays float32.
        moved: bytes a rank sends, for each of `symbol`.
    """

    kind: str
    cells: tuple[int, ...]
    split_dim: int | None = None
    join_dim: int | None = None
    sizes: tuple[int, ...] | None = None
    symbol: tuple[str, int] | None = None
    own_tokens: bool = False
    wide: bool = False
    moved: Fraction


def transitions_between(
    mesh: Mesh,
    before: Symbol,
    after: Symbol,
    states: States,
    wanted: States,
    *,
    wide: bool = False,
) -> tuple[Transition, ...] | None:
    """The steps from one way of lying to another; None if there is no way.

    A ring's bytes: (n - 1) / n of the whole tensor to scatter or gather it, twice that for both
    (Thakur, Rabenseifner and Gropp 2005).

    Args:
        mesh: sizes of the cells.
        before, after: the tensor on both sides, for its dimensions.
        states: how it lies.
        wanted: how it is to lie.
        wide: whether a sum may stay float32, which two ranks get for nothing: each sends the other
            all it has, and the sum is made where it is used.
    """
    groups: dict[tuple[str, int | None, int | None, bool], list[int]] = {}
    for cell, (old, new) in enumerate(zip(states, wanted, strict=True)):
        old_dim, new_dim = _divided_dim(before, cell), _divided_dim(after, cell)
        if old == new and old_dim == new_dim:
            continue
        kind = "all_to_all" if old == new else _KIND_OF.get((old, new))
        if kind is None:
            return None
        split = {"F": new_dim, "T": 0, "B": 0}.get(new)
        join = {"F": old_dim, "T": 0, "B": 0}.get(old)
        groups.setdefault((kind, split, join, "B" in (old, new)), []).append(cell)
    symbol, local = before.per_symbol()
    held = Fraction(local)
    for cell, state in enumerate(states):
        ranks = mesh.cells[cell]
        if state == "T":
            held /= ranks
        elif cell in mesh.cells_of("dp") and state != "B":
            held *= ranks
    found = []
    for (kind, split, join, own), cells in sorted(
        groups.items(), key=lambda item: KINDS.index(item[0][0])
    ):
        ranks = mesh.size(cells)
        fraction = Fraction(ranks - 1, ranks)
        moved = Fraction(0)
        if kind == "slice":
            held /= ranks
        elif kind == "reduce_scatter":
            moved = fraction * held
            held /= ranks
        elif kind == "all_to_all":
            moved = fraction * held
        elif kind in ("all_reduce", "merge"):
            moved = 2 * fraction * held
        else:
            held *= ranks
            moved = fraction * held
        first = before.dims[0]
        found.append(
            Transition(
                kind=kind,
                cells=tuple(cells),
                split_dim=split,
                join_dim=join,
                sizes=_sizes(before, after, split, join),
                symbol=(first.symbol, first.size) if symbol and first.symbol else None,
                own_tokens=own,
                wide=wide and kind == "all_reduce" and ranks == 2,
                moved=moved,
            )
        )
    return tuple(found)


def _divided_dim(symbol: Symbol, cell: int) -> int | None:
    return next((index for index, dim in enumerate(symbol.dims) if cell in dim.cells), None)


def _sizes(
    before: Symbol, after: Symbol, split: int | None, join: int | None
) -> tuple[int, ...] | None:
    """What each rank has of the features that a step splits or joins."""
    places: Sequence[tuple[Symbol, int | None]] = ((before, join), (after, split))
    for symbol, place in places:
        if place is not None and symbol.dims[place].cells:
            (sizes,) = symbol.dims[place].sizes
            return sizes
    return None
