"""Choosing how tokens lie, and where partial sums are made whole, so that the fewest bytes move.

A walk over the trace in its order. What matters of the past is only how the tensors lie that are
still to be used, so of all ways that lead to the same such state the cheapest is kept: dynamic
programming, exact over all placements that boundaries and ops allow.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from tokenspeed.core.errors import PlacementError
from tokenspeed.distributed import Mesh
from tokenspeed.modeling.compiler.events import Crossing, Event, OpEvent, Unsaid
from tokenspeed.modeling.compiler.symbol import Symbol
from tokenspeed.modeling.compiler.transition import States, Transition, transitions_between
from tokenspeed.modeling.placement import (
    Partial,
    PartialSoftmax,
    PerPart,
    PerToken,
    Placement,
    Replicate,
)

__all__ = ["Choice", "cost_of", "entries", "solve"]

Live = tuple[tuple[int, States], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was decided for one crossing.

    Attributes:
        crossing: which.
        states: how the tensor lies once it has crossed.
        transitions: what makes it so.
    """

    crossing: Crossing
    states: States
    transitions: tuple[Transition, ...]


@dataclass(frozen=True, slots=True)
class _Way:
    """The cheapest way to a state so far; choices are linked from the last to the first."""

    cost: tuple[Fraction, int]
    last: "tuple[Choice, _Way] | None"


def solve(mesh: Mesh, events: Sequence[Event], given: Mapping[int, States]) -> tuple[Choice, ...]:
    """Choices for every crossing that together move the fewest bytes for a token.

    Of two ways that move as many, the one with fewer collectives.

    Args:
        mesh: the ranks.
        events: a trace.
        given: how the symbols lie that the trace begins with, by number.

    Raises:
        PlacementError: no choice is legal; names both modules and both placements.
    """
    last_use: dict[int, int] = {}
    for place, event in enumerate(events):
        for symbol in _read(event):
            last_use[symbol.number] = place
    start = tuple(sorted((number, states) for number, states in given.items()))
    ways: dict[Live, _Way] = {start: _Way((Fraction(0), 0), None)}
    for place, event in enumerate(events):
        following: dict[Live, _Way] = {}
        reasons: list[str] = []
        for live, way in ways.items():
            lying = dict(live)
            for made, choice, reason in _outcomes(mesh, event, lying):
                if reason is not None:
                    reasons.append(reason)
                    continue
                cost, last = way.cost, way.last
                if choice is not None:
                    moved, count = cost_of(choice.transitions)
                    cost = (cost[0] + moved, cost[1] + count)
                    last = (choice, way)
                state = tuple(
                    sorted(
                        (number, states)
                        for number, states in (lying | made).items()
                        if last_use.get(number, -1) > place
                    )
                )
                if state not in following or cost < following[state].cost:
                    following[state] = _Way(cost, last)
        if not following:
            raise PlacementError(reasons[0])
        ways = following
    best = min(ways.values(), key=lambda way: way.cost)
    choices = []
    while best.last is not None:
        choice, best = best.last
        choices.append(choice)
    return tuple(reversed(choices))


def cost_of(transitions: Sequence[Transition]) -> tuple[Fraction, int]:
    """Bytes for a token, which here is a sampled one too, and collectives."""
    moved = sum((transition.moved for transition in transitions), Fraction(0))
    return moved, sum(transition.kind != "slice" for transition in transitions)


def entries(mesh: Mesh, crossing: Crossing) -> Iterator[States]:
    """All ways in which a boundary lets a tensor in."""
    own = mesh.cells_of("dp")
    options = []
    for cell, wanted in enumerate(crossing.wanted):
        if wanted is None:
            options.append("F")
        elif isinstance(wanted, Replicate):
            options.append("R")
        elif isinstance(wanted, Partial):
            options.append("P")
        elif isinstance(wanted, PartialSoftmax):
            options.append("L")
        elif isinstance(wanted, PerPart):
            options.append("RL")
        elif isinstance(wanted, Unsaid):
            options.append("BRP" if cell in own else "RP")
        elif isinstance(wanted, PerToken):
            options.append("BR" if cell in own else "RT")
        else:
            options.append("B" if cell in own else "T")
    for states in itertools.product(*options):
        # Tokens are divided over all ranks that share them, or over none.
        sharing = {state for cell, state in enumerate(states) if cell not in own}
        if "T" not in sharing or sharing == {"T"}:
            yield states


def _read(event: Event) -> tuple[Symbol, ...]:
    return event.inputs if isinstance(event, OpEvent) else (event.before,)


def _outcomes(
    mesh: Mesh, event: Event, lying: Mapping[int, States]
) -> Iterator[tuple[dict[int, States], Choice | None, str | None]]:
    """What may come of an event: how its results lie, what was chosen, or why it is illegal."""
    if isinstance(event, OpEvent):
        made, reason = _through(mesh, event, lying)
        yield made, None, reason
        return
    before = lying[event.before.number]
    if not event.inward:
        allowed = any(before == states for states in entries(mesh, event))
        reason = (
            None
            if allowed
            else (
                f"{event.module} declares {event.parameter}={_declared(event)}, but its equations "
                f"give {_described(mesh, event.before, before)}, which comes from "
                f"{event.before.source}"
            )
        )
        choice = Choice(crossing=event, states=before, transitions=())
        yield {event.after.number: before}, choice, reason
        return
    for states in entries(mesh, event):
        steps = transitions_between(
            mesh, event.before, event.after, before, states, wide=event.wide
        )
        if steps is None:
            yield (
                {},
                None,
                (
                    f"{event.module} wants {event.parameter}={_declared(event)}, but "
                    f"{event.before.source} gives {_described(mesh, event.before, before)}, and no "
                    "collective makes the one of the other"
                ),
            )
            continue
        choice = Choice(crossing=event, states=states, transitions=steps)
        yield {event.after.number: states}, choice, None


def _through(
    mesh: Mesh, event: OpEvent, lying: Mapping[int, States]
) -> tuple[dict[int, States], str | None]:
    """How the results of an op lie, or why it cannot take its inputs."""
    flow = event.flow
    inputs = [lying[symbol.number] for symbol in event.inputs]
    carried: list[str] = []
    for cell in range(len(mesh.cells)):
        states = [states[cell] for states in inputs]
        unmerged = {index for index, state in enumerate(states) if state == "L"}
        if unmerged and unmerged == set(flow.parts):
            carried.append("L")
            continue
        if unmerged:
            return {}, _illegal(
                mesh, event, lying, states.index("L"), "cannot take parts that are not yet merged"
            )
        partial = {index for index, state in enumerate(states) if state == "P"}
        together = partial == set(flow.sums)
        alone = len(partial) == 1 and partial <= flow.factors
        if partial and not (together or alone):
            return {}, _illegal(
                mesh, event, lying, min(partial), "cannot take a sum over ranks before it is made"
            )
        others = {state for state in states if state not in ("P", "F")}
        if len(others) > 1:
            odd = next(i for i, state in enumerate(states) if state in "TB")
            return {}, _illegal(mesh, event, lying, odd, "takes tensors whose tokens lie alike")
        if flow.mixes_tokens and "T" in others:
            return {}, _illegal(
                mesh, event, lying, states.index("T"), "needs all tokens on each rank"
            )
        shared = others - {"R"}
        if partial or cell in flow.makes_partial:
            carried.append("P")
        elif cell in flow.makes_softmax:
            carried.append("L")
        else:
            carried.append(shared.pop() if shared else "R")
    made = {
        symbol.number: tuple(
            "F" if cell in symbol.cells else state for cell, state in enumerate(carried)
        )
        for symbol in event.outputs
    }
    return made, None


def _illegal(mesh: Mesh, event: OpEvent, lying: Mapping[int, States], index: int, why: str) -> str:
    symbol = event.inputs[index]
    return (
        f"{event.module}: {event.flow.name} {why}, but what comes from {symbol.source} is "
        f"{_described(mesh, symbol, lying[symbol.number])}"
    )


def _declared(crossing: Crossing) -> str:
    return ", ".join(_placement(placement) for placement in crossing.layout) or "Replicate"


def _placement(placement: Placement) -> str:
    words = [repr(placement.axis)]
    if (dim := getattr(placement, "dim", None)) is not None:
        words.append(repr(dim))
    return f"{type(placement).__name__}({', '.join(words)})"


def _described(mesh: Mesh, symbol: Symbol, states: States) -> str:
    found = []
    for cell, state in enumerate(states):
        axis = next(axis for axis in ("dp", "cp", "tp") if cell in mesh.cells_of(axis))
        if state == "F":
            place = next(i for i, dim in enumerate(symbol.dims) if cell in dim.cells)
            last = place == len(symbol.dims) - 1
            words = f"Shard({axis!r}, {'features' if last else 'heads'!r})"
        else:
            words = {
                "R": f"Replicate({axis!r})",
                "P": f"Partial({axis!r})",
                "L": f"PartialSoftmax({axis!r})",
                "T": f"Shard({axis!r}, 'tokens')",
                "B": f"Shard({axis!r}, 'tokens')",
            }[state]
        found.append(words)
    return ", ".join(dict.fromkeys(found))
