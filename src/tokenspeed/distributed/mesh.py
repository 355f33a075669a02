"""The mesh: how ranks lie over axes, once for attention and dense layers, once for experts.

Both views are of the same ranks. Attention divides them into `dp` x `cp` x `tp`, experts into
`ep` x `tp`, the last axis innermost. What both views can be put together from are *cells*: the
coarsest common refinement of the two factorisations. Four ranks with tp 4 and ep 2 are two cells of
two: attention's tp is both of them, the experts' ep the outer and their tp the inner one.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from tokenspeed.core.errors import ConfigError

__all__ = ["ATTENTION_AXES", "AXES", "EXPERT_AXES", "Mesh", "share"]

AXES: Final = ("tp", "ep", "dp", "cp")
ATTENTION_AXES: Final = ("dp", "cp", "tp")
EXPERT_AXES: Final = ("ep", "tp")


def share(units: int, ranks: int, index: int) -> tuple[int, int]:
    """First and end of the units that rank `index` gets; the first ranks get one more each."""
    each, more = divmod(units, ranks)
    first = index * each + min(index, more)
    return first, first + each + (index < more)


# Not slotted: what is derived is kept in the instance.
@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Degrees of each axis.

    Attributes:
        tp: ranks that share a layer of attention, and dense layers.
        ep: ranks that share the experts; the rest of the ranks divide each expert (`tp`).
        dp: groups of ranks with requests of their own.
        cp: ranks that share a context.

    Raises:
        ConfigError: a degree below 1, or one of both views cannot be refined to the other.
    """

    tp: int = 1
    ep: int = 1
    dp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ConfigError(f"--{axis} must be at least 1, but is {getattr(self, axis)}")
        if self.world % self.ep:
            raise ConfigError(
                f"--ep {self.ep} does not divide the {self.world} ranks that {self.flags} makes"
            )
        inner, *others = sorted(self._edges)
        for outer in others:
            if outer % inner:
                raise ConfigError(
                    f"--ep {self.ep} leaves {self.world // self.ep} ranks to an expert, which "
                    f"neither divides nor is divided by tp {self.tp}"
                )
            inner = outer

    @property
    def world(self) -> int:
        """Ranks of the mesh."""
        return self.dp * self.cp * self.tp

    @property
    def flags(self) -> str:
        """The flags that make so many ranks."""
        return f"--tp {self.tp}" + (f" --cp {self.cp}" if self.cp > 1 else "")

    @property
    def _edges(self) -> set[int]:
        """How many ranks lie within each axis of either view, and all axes inside it."""
        return {1, self.world // self.ep, self.tp, self.cp * self.tp, self.world}

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """Ranks along each cell, the outermost first."""
        edges = sorted(self._edges)
        return tuple(outer // inner for inner, outer in itertools.pairwise(edges))[::-1]

    def cells_of(self, axis: str, *, experts: bool = False) -> tuple[int, ...]:
        """Indices of the cells that make an axis in one of both views; none for degree 1."""
        degrees = (
            {"ep": self.ep, "tp": self.world // self.ep}
            if experts
            else {"dp": self.dp, "cp": self.cp, "tp": self.tp}
        )
        names = EXPERT_AXES if experts else ATTENTION_AXES
        if axis not in names:
            return ()
        inner = math.prod(degrees[name] for name in names[names.index(axis) + 1 :])
        return tuple(
            index
            for index in range(len(self.cells))
            if inner <= math.prod(self.cells[index + 1 :]) < inner * degrees[axis]
        )

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """A rank's place along each cell."""
        assert 0 <= rank < self.world
        places = []
        for size in reversed(self.cells):
            rank, place = divmod(rank, size)
            places.append(place)
        return tuple(reversed(places))

    def size(self, cells: Sequence[int]) -> int:
        """Ranks of a group over some cells."""
        return math.prod(self.cells[cell] for cell in cells)

    def index(self, rank: int, cells: Sequence[int]) -> int:
        """A rank's place in its group over some cells, given from the outermost."""
        places = self.coordinates(rank)
        index = 0
        for cell in cells:
            index = index * self.cells[cell] + places[cell]
        return index

    def groups(self, cells: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """All groups of ranks that differ along some cells only, each in order of its members."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            others = tuple(
                place for cell, place in enumerate(self.coordinates(rank)) if cell not in cells
            )
            found.setdefault(others, []).append(rank)
        return tuple(tuple(ranks) for ranks in found.values())

    def __str__(self) -> str:
        dense = " ".join(
            f"{axis}{getattr(self, axis)}"
            for axis in ATTENTION_AXES
            if axis == "tp" or getattr(self, axis) > 1
        )
        return f"{dense}, experts ep{self.ep} tp{self.world // self.ep}"
