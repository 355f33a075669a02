"""How a tensor lies over the ranks of each mesh axis, declared at the boundary of a module.

Axes are `tp` (attention and dense layers), `ep` (experts), `dp` (requests) and `cp` (context). On
an axis that a declaration does not mention, a tensor is replicated.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from tokenspeed.core.errors import ConfigError

__all__ = ["AXES", "Boundary", "Layout", "Partial", "Placement", "Replicate", "Shard", "boundary"]

AXES = ("tp", "ep", "dp", "cp")

C = TypeVar("C", bound=type)


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the whole tensor."""

    axis: str

    def __post_init__(self) -> None:
        _check_axis(self.axis)


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank of the axis holds an equal share of one dimension, in order of rank.

    Attributes:
        axis: mesh axis.
        dim: what is divided, in words: "tokens", "heads", "experts", "vocabulary", "features" of
            activations, "inputs" or "outputs" of a weight.
    """

    axis: str
    dim: str

    def __post_init__(self) -> None:
        _check_axis(self.axis)


@dataclass(frozen=True, slots=True)
class Partial:
    """The tensor is the sum of what the ranks of the axis hold."""

    axis: str

    def __post_init__(self) -> None:
        _check_axis(self.axis)


Placement = Replicate | Shard | Partial
Layout = Placement | tuple[Placement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """How a module's inputs must lie, by parameter of `forward`, and how its outputs will.

    Parameters without an entry are not tensors of the data flow: page tables, positions.
    """

    inputs: Mapping[str, tuple[Placement, ...]] = field(default_factory=dict)
    outputs: tuple[tuple[Placement, ...], ...]


def boundary(
    *, out: Layout | None = None, outs: tuple[Layout, ...] = (), **inputs: Layout
) -> Callable[[C], C]:
    """Declare the boundary of a module class; it becomes the class's `boundary`.

    Args:
        out: layout of the result of a `forward` that returns one tensor.
        outs: layouts of the results of one that returns a tuple.
        inputs: layouts of `forward`'s tensors, by parameter.

    Raises:
        ConfigError: `forward` has no such parameter, an axis is placed twice, or there is not
            exactly one of out and outs.
    """

    def declare(cls: C) -> C:
        if (out is None) == (not outs):
            raise ConfigError(f"the boundary of {cls.__name__} needs either out or outs")
        parameters = inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
        for name in inputs:
            if name not in parameters or name == "self":
                raise ConfigError(
                    f"the boundary of {cls.__name__} places {name!r}, but its forward takes "
                    f"({', '.join(parameters)})"
                )
        declared = Boundary(
            inputs={name: _placements(cls, name, layout) for name, layout in inputs.items()},
            outputs=tuple(
                _placements(cls, "out", layout) for layout in (outs if out is None else (out,))
            ),
        )
        cls.boundary = declared  # type: ignore[attr-defined]
        return cls

    return declare


def _placements(cls: type, name: str, layout: Layout) -> tuple[Placement, ...]:
    placements = layout if isinstance(layout, tuple) else (layout,)
    axes = [placement.axis for placement in placements]
    if len(set(axes)) < len(axes):
        raise ConfigError(f"the boundary of {cls.__name__} places {name!r} twice on one axis")
    return placements


def _check_axis(axis: str) -> None:
    if axis not in AXES:
        raise ConfigError(f"a mesh axis is one of {', '.join(AXES)}, not {axis!r}")
