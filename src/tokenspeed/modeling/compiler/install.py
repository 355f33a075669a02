"""Putting a compiled program into a model: each transition stands before the `forward` it serves.

A module without transitions is left as it is, so a model of one rank pays nothing.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenspeed.distributed import Group
from tokenspeed.modeling.compiler.program import Program
from tokenspeed.modeling.compiler.transition import Transition
from tokenspeed.modeling.module import Module

__all__ = [
    "Groups",
    "Keep",
    "StepInProgress",
    "apply_transition",
    "inner_forward",
    "install",
    "modules_of",
]

Groups = Mapping[tuple[int, ...], Group]

Keep = Callable[[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], None]
"""Takes what comes, room for what it becomes, of as many rows, and what makes this of that, for any
number of the first rows."""


@dataclass(slots=True)
class StepInProgress:
    """What exchanges are to know of the step that runs, or is recorded.

    Attributes:
        by_symbol: how many tokens it has, "T", and how many of them are sampled, "S".
        keep: while a step is recorded, what keeps an exchange for later; None where it runs.
    """

    by_symbol: dict[str, int] = field(default_factory=dict)
    keep: "Keep | None" = None


def install(
    root: Module,
    program: Program,
    groups: Groups,
    *,
    counts: Callable[..., Mapping[str, int]],
    known: StepInProgress | None = None,
) -> None:
    """Make a model run its program on one rank.

    Args:
        root: the model, its weights placed.
        program: what was compiled for it.
        groups: this rank's, by cells.
        counts: tokens "T" and sampled tokens "S" of the arguments that the model is called with.
        known: where they are kept during a step.
    """
    known = known or StepInProgress()
    by_path: dict[str, dict[str, list[Transition]]] = {}
    for step in program.steps:
        by_path.setdefault(step.path, {}).setdefault(step.parameter, []).append(step.transition)
    modules = dict(modules_of(root))
    for path, entering in by_path.items():
        if path:
            _put_before(modules[path], entering, groups, known)
    if program.steps:
        _put_around(root, by_path.get("", {}).get("result", []), groups, known, counts)


def apply_transition(
    transition: Transition, x: torch.Tensor, groups: Groups, known: StepInProgress
) -> torch.Tensor:
    """Run one transition on a rank's tensor."""
    group = groups[transition.cells]
    if transition.kind == "all_reduce":
        return group.all_reduce(x, wide=transition.wide)
    if transition.kind == "merge":
        return group.merge(x)
    if transition.kind == "slice":
        assert transition.split_dim is not None
        sizes = _sizes(transition, transition.split_dim, x, group, known)
        return torch.split(x, sizes, transition.split_dim)[group.index]
    if transition.kind == "reduce_scatter":
        assert transition.split_dim is not None
        sizes = _sizes(transition, transition.split_dim, x, group, known)
        return group.reduce_scatter(x, dim=transition.split_dim, sizes=sizes)
    assert transition.join_dim is not None
    joined = _sizes(transition, transition.join_dim, x, group, known)
    if transition.kind == "all_gather":
        return group.all_gather(x, dim=transition.join_dim, sizes=joined)
    assert transition.split_dim is not None
    return group.all_to_all(
        x,
        split_dim=transition.split_dim,
        split_sizes=_sizes(transition, transition.split_dim, x, group, known),
        join_dim=transition.join_dim,
        join_sizes=joined,
    )


def inner_forward(module: Module) -> Callable[..., Any]:
    """A module's `forward` as it is now, to be called by what takes its place.

    It does not keep the module alive: the module keeps what takes the place, and of a ring of the
    two nothing would be freed where no collector runs.
    """
    if "forward" in vars(module):
        placed: Callable[..., Any] = vars(module)["forward"]
        return placed
    owner, forward = weakref.ref(module), type(module).forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(owner(), *args, **kwargs)

    return call


def modules_of(root: Module, path: str = "") -> Iterator[tuple[str, Module]]:
    """All modules by dotted path; the root's is empty."""
    yield path, root
    for name, child in root.children():
        yield from modules_of(child, f"{path}.{name}" if path else name)


def _sizes(
    transition: Transition, dim: int, x: torch.Tensor, group: Group, known: StepInProgress
) -> list[int]:
    """What each member has of a dimension when it is divided."""
    if dim != 0 or transition.symbol is None:
        assert transition.sizes is not None
        return list(transition.sizes)
    symbol, times = transition.symbol
    return [times * count for count in group.shares(known.by_symbol[symbol])]


def _put_before(
    module: Module,
    entering: Mapping[str, Sequence[Transition]],
    groups: Groups,
    known: StepInProgress,
) -> None:
    forward = inner_forward(module)
    # What may stand before it already takes any arguments.
    _, *names = inspect.signature(type(module).forward).parameters
    places = [(names.index(name), name, steps) for name, steps in entering.items()]

    def crossing(*args: Any, **kwargs: Any) -> Any:
        values = list(args)
        for place, name, steps in places:
            if place < len(values):
                values[place] = _through(steps, values[place], groups, known)
            elif name in kwargs:
                kwargs[name] = _through(steps, kwargs[name], groups, known)
        return forward(*values, **kwargs)

    vars(module)["forward"] = crossing


def _put_around(
    root: Module,
    leaving: Sequence[Transition],
    groups: Groups,
    known: StepInProgress,
    counts: Callable[..., Mapping[str, int]],
) -> None:
    forward = inner_forward(root)

    def around(*args: Any, **kwargs: Any) -> Any:
        known.by_symbol.update(counts(*args, **kwargs))
        return _through(leaving, forward(*args, **kwargs), groups, known)

    vars(root)["forward"] = around


def _through(steps: Sequence[Transition], value: Any, groups: Groups, known: StepInProgress) -> Any:
    if value is None:
        return None
    for transition in steps:
        if transition.kind == "slice":
            value = apply_transition(transition, value, groups, known)
        elif known.keep is not None:
            value = _kept(transition, value, groups, known, known.keep)
        elif _of_nothing(transition, known):
            value = _room(transition, value)
        else:
            value = apply_transition(transition, value, groups, known)
    return value


def _of_nothing(transition: Transition, known: StepInProgress) -> bool:
    """Whether no rank has a row to exchange: a recorded step leaves such exchanges out, so that
    others beside it are to do likewise."""
    if transition.symbol is None or 0 in (transition.split_dim, transition.join_dim):
        return False
    return (
        transition.kind in {"all_reduce", "all_gather"}
        and known.by_symbol.get(transition.symbol[0]) == 0
    )


def _kept(
    transition: Transition, x: torch.Tensor, groups: Groups, known: StepInProgress, keep: Keep
) -> torch.Tensor:
    """What a transition makes of a tensor once what is recorded runs."""
    made = _room(transition, x)

    def exchange(rows: torch.Tensor) -> torch.Tensor:
        return apply_transition(transition, rows, groups, known)

    keep(x, made, exchange)
    return made


def _room(transition: Transition, x: torch.Tensor) -> torch.Tensor:
    """Memory for what a sum, or features put together, make of a tensor."""
    shape = list(x.shape)
    if transition.kind == "all_gather":
        assert transition.join_dim and transition.sizes is not None
        shape[transition.join_dim] = sum(transition.sizes)
    return torch.empty(shape, dtype=torch.float32 if transition.wide else x.dtype, device=x.device)
