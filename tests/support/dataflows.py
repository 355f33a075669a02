"""Small modules with boundaries, and random dataflows over them.

Legend: T tokens, M features.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tokenspeed.distributed import Group, Mesh
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling.compiler import Program, Tracer, compile_module, install
from tokenspeed.modeling.layers import ColumnLinear, Linear, RMSNorm, RowLinear
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.placement import Partial, PerToken, Replicate, Shard, boundary

__all__ = ["FEATURES", "Flow", "Line", "compile_flow", "kernels", "random_flow", "run_flow"]

FEATURES = 12
DTYPE = torch.float32


def kernels(dtype: torch.dtype = DTYPE) -> KernelSelector:
    return KernelSelector(device=torch.device("cpu"), dtype=dtype)


@boundary(x_TM=Replicate("tp"), out=Partial("tp"))
class Pair(Module):
    """A divided product, and one that adds its shares up."""

    def __init__(self, selector: KernelSelector) -> None:
        self.up = ColumnLinear(FEATURES, 20, kernels=selector, bias=True)
        self.down = RowLinear(20, FEATURES, kernels=selector, bias=True)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x_TM))


@boundary(x_TM=Replicate("tp"), out=Shard("tp", "features"))
class Wide(Module):
    """A divided product whose result stays divided."""

    def __init__(self, selector: KernelSelector) -> None:
        self.up = ColumnLinear(FEATURES, FEATURES, kernels=selector)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self.up(x_TM)


@boundary(x_TM=Shard("tp", "features"), out=Partial("tp"))
class Narrow(Module):
    """A product that wants its inputs divided."""

    def __init__(self, selector: KernelSelector) -> None:
        self.down = RowLinear(FEATURES, FEATURES, kernels=selector)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self.down(x_TM)


@boundary(x_TM=PerToken("tp"), out=PerToken("tp"))
class Latent(Module):
    """Whole products to fewer features and back: tokens may be shared out."""

    def __init__(self, selector: KernelSelector) -> None:
        self.down = Linear(FEATURES, 3, kernels=selector)
        self.up = Linear(3, FEATURES, kernels=selector, bias=True)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x_TM))


@boundary(x_TM=PerToken("tp"), out=PerToken("tp"))
class Norm(Module):
    def __init__(self, selector: KernelSelector) -> None:
        self.norm = RMSNorm(FEATURES, epsilon=1e-5, kernels=selector)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self.norm(x_TM, None)[0]


@boundary(a_TM=PerToken("tp"), b_TM=PerToken("tp"), out=PerToken("tp"))
class Join(Module):
    def forward(self, a_TM: torch.Tensor, b_TM: torch.Tensor) -> torch.Tensor:
        return a_TM + b_TM


KINDS = {"pair": Pair, "wide": Wide, "narrow": Narrow, "latent": Latent, "norm": Norm, "join": Join}


@dataclass(frozen=True)
class Line:
    """One line of a flow: a module, or "sum" or "scale", over earlier values by number."""

    kind: str
    takes: tuple[int, ...]


class Flow(Module):
    """Runs lines over a growing list of values, the first of which is what it is given."""

    def __init__(self, lines: Sequence[Line], selector: KernelSelector) -> None:
        self.lines = tuple(lines)
        self.parts = tuple(
            None
            if line.kind in ("sum", "scale")
            else Join()
            if line.kind == "join"
            else KINDS[line.kind](selector)
            for line in lines
        )

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        values = [x_TM]
        for line, part in zip(self.lines, self.parts, strict=True):
            taken = [values[number] for number in line.takes]
            if line.kind == "sum":
                values.append(taken[0] + taken[1])
            elif line.kind == "scale":
                values.append(taken[0] * 0.5)
            else:
                assert part is not None
                values.append(part(*taken))
        return values[-1]


def random_flow(seed: int, *, lines: int) -> list[Line]:
    """Lines that are legal on any mesh: sums are of two values that lie alike, whatever is chosen.

    A module may take any earlier value. Every value is of the same shape.
    """
    choose = random.Random(seed)
    found: list[Line] = []
    partial: list[int] = []
    for number in range(1, lines + 1):
        kinds = ["pair", "wide", "narrow", "latent", "norm", "join", "join"]
        kinds += ["sum", "sum"] * (len(partial) > 1) + ["scale"] * bool(partial)
        kind = choose.choice(kinds)
        latest = range(max(0, number - 4), number)
        if kind in ("sum", "scale"):
            takes = tuple(choose.sample(partial, 2 if kind == "sum" else 1))
        else:
            takes = tuple(choose.choice(latest) for _ in range(2 if kind == "join" else 1))
        if kind in ("pair", "narrow", "sum", "scale"):
            partial.append(number)
        found.append(Line(kind, takes))
    return found


def compile_flow(
    lines: Sequence[Line], mesh: Mesh, *, rank: int = 0, dtype: torch.dtype = DTYPE
) -> Program:
    return compile_module(
        lambda selector: Flow(lines, selector),
        symbols,
        kernels=kernels(dtype),
        mesh=mesh,
        rank=rank,
    )


def symbols(tracer: Tracer, twin: Module) -> tuple[object, ...]:
    return (tracer.input("T", FEATURES),)


def run_flow(
    lines: Sequence[Line],
    x_TM: torch.Tensor,
    *,
    program: Program | None = None,
    rank: int = 0,
    groups: Mapping[tuple[int, ...], Group] | None = None,
) -> torch.Tensor:
    """The flow's result, of weights that are the same whoever runs it."""
    flow = Flow(lines, kernels())
    if program is not None:
        program.place_weights(flow, rank)
        install(flow, program, groups or {}, counts=lambda x: {"T": len(x)})
    for number, (_, weight) in enumerate(flow.weights()):
        generator = torch.Generator().manual_seed(number)
        weight.fill(None, torch.randn(weight.shape, generator=generator) * 0.4)
    with torch.inference_mode():
        return flow.forward(x_TM)
