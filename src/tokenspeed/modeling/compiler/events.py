"""What a trace takes down: ops, and tensors that cross a module's boundary."""

from dataclasses import dataclass

from tokenspeed.modeling.compiler.symbol import Flow, Symbol
from tokenspeed.modeling.placement import PerToken, Placement

__all__ = ["Crossing", "Event", "Layout", "OpEvent", "Unsaid"]

Layout = tuple[Placement, ...]


class Unsaid(PerToken):
    """On an axis of which boundaries need not speak: as a tensor comes, a sum too, but tokens of a
    context are not divided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpEvent:
    """An op: what goes in, what comes out.

    Attributes:
        module: path and class of the innermost module that runs it, for people.
        flow: how placements pass through.
        inputs, outputs: symbols.
    """

    module: str
    flow: Flow
    inputs: tuple[Symbol, ...]
    outputs: tuple[Symbol, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A tensor crosses a module's boundary.

    Attributes:
        path: the module's path.
        module: path and class, for people.
        parameter: of its `forward` on the way in; "out", or "out[i]", on the way out.
        inward: whether it goes in.
        before: what comes.
        after: what the other side sees.
        wanted: by cell, how it is to lie (on the way in) or is said to (on the way out); None
            where a cell divides features.
        layout: the declaration.
        wide: whether a sum over ranks may be handed on in float32.
    """

    path: str
    module: str
    parameter: str
    inward: bool
    before: Symbol
    after: Symbol
    wanted: tuple[Placement | None, ...]
    layout: Layout
    wide: bool = False


Event = OpEvent | Crossing
