"""The compiled program: which transitions stand before which module, and what each rank holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch

from tokenspeed.core.errors import PlacementError
from tokenspeed.distributed import Mesh
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling.compiler.rules import RULES
from tokenspeed.modeling.compiler.solve import Choice, solve
from tokenspeed.modeling.compiler.symbol import Dim
from tokenspeed.modeling.compiler.trace import Tracer
from tokenspeed.modeling.compiler.transition import States, Transition
from tokenspeed.modeling.cut import Division
from tokenspeed.modeling.module import Module, Weight

__all__ = ["Lying", "Program", "Step", "WeightPlacement", "compile_module"]

M = TypeVar("M", bound=Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A transition, and where it stands.

    Attributes:
        path: of the module before whose `forward` it runs; "" for the model.
        module: path and class, for people.
        parameter: what it is done to; "result" for what the model gives.
        source: the module that the tensor comes from, for people.
        transition: what is done.
    """

    path: str
    module: str
    parameter: str
    source: str
    transition: Transition


@dataclass(frozen=True, slots=True, kw_only=True)
class Lying:
    """How a tensor lies once it has crossed a boundary, on the rank that was traced.

    Attributes:
        path: of the module.
        module: path and class, for people.
        parameter: which tensor.
        inward: whether it went in.
        states: by cell; see `transition`.
        dims: its dimensions.
    """

    path: str
    module: str
    parameter: str
    inward: bool
    states: States
    dims: tuple[Dim, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlacement:
    """How ranks share a weight.

    Attributes:
        divided: cells of the mesh by dimension.
        single: cells over which one rank has the values and the others zeros.
    """

    divided: Mapping[str, tuple[int, ...]]
    single: frozenset[int]

    def apply(self, weight: Weight, mesh: Mesh, rank: int) -> None:
        """Make a weight a rank's share.

        Raises:
            ConfigError: a dimension cannot be divided so.
        """
        coordinates = mesh.coordinates(rank)
        weight.place(
            {
                dim: Division(shards=mesh.size(cells), index=mesh.index(rank, cells))
                for dim, cells in self.divided.items()
            },
            absent=any(coordinates[cell] for cell in self.single),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What the compiler found for one model on one mesh.

    The transitions are the same on all ranks; sizes of shares are each rank's own.

    Attributes:
        mesh: the ranks.
        steps: every transition, in the order in which they run.
        weights: by our name; those not named are whole everywhere.
        lying: every crossing of a boundary, for `check_placements`.
    """

    mesh: Mesh
    steps: tuple[Step, ...]
    weights: Mapping[str, WeightPlacement]
    lying: tuple[Lying, ...]

    @property
    def collectives(self) -> tuple[Step, ...]:
        """The steps that move anything between ranks."""
        return tuple(step for step in self.steps if step.transition.kind != "slice")

    @property
    def keeps_tokens_together(self) -> bool:
        """Whether nothing is exchanged but rows of all of a step's tokens, or of all sampled ones,
        as sums and features put together."""
        return all(
            step.transition.kind in {"slice", "all_reduce", "all_gather"}
            and step.transition.split_dim != 0
            and step.transition.join_dim != 0
            and step.transition.symbol is not None
            and step.transition.symbol[1] == 1
            for step in self.steps
        )

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Cells of every group of ranks that a step needs, in one order on all ranks."""
        return tuple(sorted({step.transition.cells for step in self.steps}))

    def moved(self) -> dict[str, Fraction]:
        """Bytes that a rank sends in a step, for each token ("T") and each sampled one ("S")."""
        found = {"T": Fraction(0), "S": Fraction(0)}
        for step in self.steps:
            if step.transition.symbol is not None:
                found[step.transition.symbol[0]] += step.transition.moved
        return found

    def place_weights(self, root: Module, rank: int) -> None:
        """Make the weights of a model a rank's shares, before any has memory.

        Raises:
            ConfigError: a dimension cannot be divided so.
        """
        placed: set[int] = set()
        for name, weight in root.weights():
            if name in self.weights and id(weight) not in placed:
                placed.add(id(weight))
                self.weights[name].apply(weight, self.mesh, rank)


def compile_module(
    build: Callable[[KernelSelector], M],
    arguments: Callable[[Tracer, M], tuple[object, ...]],
    *,
    kernels: KernelSelector,
    mesh: Mesh,
    rank: int = 0,
) -> Program:
    """Find the program of a module whose `forward` gives one tensor, which all ranks are to have.

    Args:
        build: makes the module with a selector of kernels; called once, for a twin without
            memory.
        arguments: makes the symbols that the twin's `forward` is called with.
        kernels: answers what formats weights have.
        mesh: the ranks.
        rank: whose shapes are traced.

    Raises:
        PlacementError: boundaries or equations do not fit together.
        ConfigError: a dimension cannot be divided over so many ranks.
    """
    if mesh.world == 1:
        return Program(mesh=mesh, steps=(), weights={}, lying=())
    tracer = Tracer(mesh, rank, RULES)
    try:
        with torch.device("meta"):
            twin = build(tracer.kernels(kernels))
        tracer.adopt(twin, kernels.dtype)
        tracer.deliver(twin.forward(*arguments(tracer, twin)))
        return _solved(tracer, mesh)
    finally:
        tracer.forget()


def _solved(tracer: Tracer, mesh: Mesh) -> Program:
    own = mesh.cells_of("dp")
    start = tuple("B" if cell in own else "R" for cell in range(len(mesh.cells)))
    choices = solve(mesh, tracer.events, dict.fromkeys(tracer.given, start))
    return Program(
        mesh=mesh,
        steps=_steps(choices),
        weights={
            name: WeightPlacement(divided=data.divided or {}, single=data.partial)
            for name, data in tracer.weights.items()
            if data.divided or data.partial
        },
        lying=tuple(
            Lying(
                path=choice.crossing.path,
                module=choice.crossing.module,
                parameter=choice.crossing.parameter,
                inward=choice.crossing.inward,
                states=choice.states,
                dims=choice.crossing.after.dims,
            )
            for choice in choices
        ),
    )


def _steps(choices: tuple[Choice, ...]) -> tuple[Step, ...]:
    known: dict[tuple[str, str], tuple[Transition, ...]] = {}
    steps = []
    for choice in choices:
        crossing = choice.crossing
        key = (crossing.path, crossing.parameter)
        if known.setdefault(key, choice.transitions) != choice.transitions:
            raise PlacementError(
                f"{crossing.module} is called more than once, and {crossing.parameter} comes "
                "differently each time; give each call a module of its own"
            )
        steps += [
            Step(
                path=crossing.path,
                module=crossing.module,
                parameter=crossing.parameter,
                source=crossing.before.source,
                transition=transition,
            )
            for transition in choice.transitions
        ]
    return tuple(steps)
