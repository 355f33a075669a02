"""How a tensor lies over the ranks of each mesh axis, declared at the boundary of a module.

Axes are `tp` (attention and dense layers), `ep` (experts), `dp` (requests) and `cp` (context). On
an axis that a declaration does not mention, a tensor is replicated; on `dp` every rank has the
tokens of its own requests, which no declaration needs to say.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from tokenspeed.core.errors import ConfigError
from tokenspeed.distributed import ATTENTION_AXES, AXES, EXPERT_AXES

__all__ = [
    "Boundary",
    "Layout",
    "Partial",
    "PartialSoftmax",
    "PerPart",
    "PerToken",
    "Placement",
    "Replicate",
    "Shard",
    "boundary",
]

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
        dim: what is divided, in words: "tokens" (the first dimension), "heads" (the one before
            the last), "features" or "vocabulary" (the last).
    """

    axis: str
    dim: str

    def __post_init__(self) -> None:
        _check_axis(self.axis)
        if self.dim not in SHARDED_DIMS:
            raise ConfigError(f"a boundary divides {', '.join(SHARDED_DIMS)}, not {self.dim!r}")

    @property
    def dim_index(self) -> int:
        """Which dimension of a tensor it is."""
        return SHARDED_DIMS[self.dim]


@dataclass(frozen=True, slots=True)
class Partial:
    """The tensor is the sum of what the ranks of the axis hold."""

    axis: str

    def __post_init__(self) -> None:
        _check_axis(self.axis)


@dataclass(frozen=True, slots=True)
class PartialSoftmax:
    """Each rank of the axis holds means over some of what a softmax goes over, and behind each, as
    the last feature, the logarithm of the sum it was divided by. The tensor is their mean, weighted
    by the exponents of these, and the logarithm of the sum of all.
    """

    axis: str

    def __post_init__(self) -> None:
        _check_axis(self.axis)


@dataclass(frozen=True, slots=True)
class PerToken:
    """Either the whole tensor, or a share of the tokens, whichever moves less.

    For modules that compute each token by itself (norms, products with whole weights). Inputs that
    one op reads together lie the same way.
    """

    axis: str

    def __post_init__(self) -> None:
        _check_axis(self.axis)


@dataclass(frozen=True, slots=True)
class PerPart:
    """Either the whole tensor, or parts of a softmax as `PartialSoftmax` has them, whichever moves
    less; a whole one has logarithms of sums behind its means too.

    For modules in whose results each mean is a linear function of what it was, and each logarithm
    what it was: they may be computed of each rank's parts, or of the parts put together.
    """

    axis: str

    def __post_init__(self) -> None:
        _check_axis(self.axis)


SHARDED_DIMS = {"tokens": 0, "heads": -2, "features": -1, "vocabulary": -1}
Placement = Replicate | Shard | Partial | PartialSoftmax | PerPart | PerToken
Layout = Placement | tuple[Placement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """How a module's inputs must lie, by parameter of `forward`, and how its outputs will.

    Parameters without an entry are not tensors of the data flow: page tables, positions.

    Attributes:
        inputs: placements by parameter.
        outputs: placements of each result.
        experts: whether axes are those of the experts' view of the mesh, `ep` x `tp`, and not of
            attention's, `dp` x `cp` x `tp`.
    """

    inputs: Mapping[str, tuple[Placement, ...]] = field(default_factory=dict)
    outputs: tuple[tuple[Placement, ...], ...]
    experts: bool = False


def boundary(
    *,
    out: Layout | None = None,
    outs: tuple[Layout, ...] = (),
    experts: bool = False,
    **inputs: Layout,
) -> Callable[[C], C]:
    """Declare the boundary of a module class; it becomes the class's `boundary`.

    Args:
        out: layout of the result of a `forward` that returns one tensor.
        outs: layouts of the results of one that returns a tuple.
        experts: whether axes are those of the experts' view of the mesh.
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
        axes = EXPERT_AXES if experts else ATTENTION_AXES
        declared = Boundary(
            inputs={name: _placements(cls, name, layout, axes) for name, layout in inputs.items()},
            outputs=tuple(
                _placements(cls, "out", layout, axes)
                for layout in (outs if out is None else (out,))
            ),
            experts=experts,
        )
        cls.boundary = declared  # type: ignore[attr-defined]
        return cls

    return declare


def _placements(
    cls: type, name: str, layout: Layout, axes: tuple[str, ...]
) -> tuple[Placement, ...]:
    placements = layout if isinstance(layout, tuple) else (layout,)
    named = [placement.axis for placement in placements]
    if len(set(named)) < len(named):
        raise ConfigError(f"the boundary of {cls.__name__} places {name!r} twice on one axis")
    for axis in named:
        if axis not in axes:
            raise ConfigError(
                f"the boundary of {cls.__name__} places {name!r} on {axis!r}, but its view of the "
                f"mesh has {', '.join(axes)}; experts=True is the one of experts"
            )
    return placements


def _check_axis(axis: str) -> None:
    if axis not in AXES:
        raise ConfigError(f"a mesh axis is one of {', '.join(AXES)}, not {axis!r}")
