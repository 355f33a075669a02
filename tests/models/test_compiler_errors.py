"""Models that several ranks cannot run are refused with the modules and placements at fault."""

from collections.abc import Callable

import pytest
import torch

from tests.support.dataflows import FEATURES, Narrow, Pair, Wide, kernels
from tokenspeed.core.errors import PlacementError
from tokenspeed.distributed import Mesh
from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.modeling.compiler import Tracer, compile_module
from tokenspeed.modeling.layers import ColumnLinear, Embedding, Linear, RMSNorm
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.placement import Partial, PerToken, Replicate, Shard, boundary

Forward = Callable[[Module, torch.Tensor], torch.Tensor]


@boundary(x_TM=Partial("tp"), out=Partial("tp"))
class WantsASum(Module):
    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return x_TM


@boundary(x_TM=Replicate("tp"), out=Replicate("tp"))
class ClaimsASumIsWhole(Module):
    def __init__(self, selector: KernelSelector) -> None:
        self.pair = Pair(selector)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self.pair(x_TM)


@boundary(x_TM=Replicate("tp"), out=Shard("tp", "features"))
class ClaimsToDivide(Module):
    def __init__(self, selector: KernelSelector) -> None:
        self.whole = Linear(FEATURES, FEATURES, kernels=selector)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self.whole(x_TM)


@boundary(x_TM=Shard("tp", "features"), out=Shard("tp", "features"))
class NormsAShare(Module):
    def __init__(self, selector: KernelSelector) -> None:
        self._weight = RMSNorm(FEATURES, epsilon=1e-5, kernels=selector).weight
        self._norm = selector.select(ops.norm.rms_norm)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self._norm(x_TM, self._weight.data, 1e-5)


@boundary(x_TM=Replicate("tp"), out=Shard("tp", "features"))
class Stacked(Module):
    def __init__(self, selector: KernelSelector) -> None:
        self.both = ColumnLinear(
            FEATURES, 2 * FEATURES, kernels=selector, parts={"a": FEATURES, "b": FEATURES}
        )

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self.both(x_TM)


@boundary(x_TM=Replicate("tp"), outs=(Replicate("tp"), Replicate("tp")))
class GivesOne(Module):
    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return x_TM


class Whole(Module):
    """A model of the modules it is given, with one expression as its forward."""

    def __init__(self, forward: Forward, **parts: Callable[[KernelSelector], Module]) -> None:
        self._forward = forward
        self._parts = parts

    def build(self, selector: KernelSelector) -> Module:
        for name, part in self._parts.items():
            vars(self)[name] = part(selector)
        return self

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x_TM)


def tied(selector: KernelSelector) -> Embedding:
    return Embedding(100, FEATURES, kernels=selector)


CASES: dict[str, tuple[Whole, list[str]]] = {
    "a whole tensor where a sum is wanted": (
        Whole(
            lambda m, x: m.tail(m.norm(x, None)[0]),
            norm=lambda s: RMSNorm(FEATURES, epsilon=1e-5, kernels=s),
            tail=lambda s: WantsASum(),
        ),
        ["tail (WantsASum)", "x_TM=Partial('tp')", "norm (RMSNorm)", "no collective"],
    ),
    "divided features where a sum is wanted": (
        Whole(lambda m, x: m.tail(m.wide(x)), wide=Wide, tail=lambda s: WantsASum()),
        ["tail (WantsASum)", "wide (Wide)", "Shard('tp', 'features')", "Partial('tp')"],
    ),
    "a sum declared whole": (
        Whole(lambda m, x: m.head(x), head=ClaimsASumIsWhole),
        ["head (ClaimsASumIsWhole)", "out=Replicate('tp')", "Partial('tp')", "head.pair (Pair)"],
    ),
    "a whole product declared divided": (
        Whole(lambda m, x: m.head(x), head=ClaimsToDivide),
        ["head (ClaimsToDivide)", "out=Shard", "every dimension whole over tp"],
    ),
    "a norm of divided features": (
        Whole(lambda m, x: m.norm(m.wide(x)), wide=Wide, norm=NormsAShare),
        ["norm (NormsAShare)", "norm.rms_norm needs all features", "wide (Wide)"],
    ),
    "a gate before its sum": (
        Whole(
            lambda m, x: m.pair(x) * m.pair(x),
            pair=Pair,
        ),
        ["the model (Whole)", "multiplication", "sum over ranks", "pair (Pair)", "Partial('tp')"],
    ),
    "a whole tensor added to a sum": (
        Whole(lambda m, x: x + m.pair(x), pair=Pair),
        ["the model (Whole)", "addition", "pair (Pair)", "Partial('tp')"],
    ),
    "a slice through a divided dimension": (
        Whole(lambda m, x: m.narrow(m.both(x)[:, :5]), both=Stacked, narrow=Narrow),
        ["the model (Whole)", "a slice 0:5", "pieces end at [6, 12]"],
    ),
    "divided features added to whole ones": (
        Whole(lambda m, x: m.wide(x) + x, wide=Wide),
        ["the model (Whole)", "addition of [T, 6] and [T, 12]", "wide (Wide)"],
    ),
    "something of PyTorch's without a rule": (
        Whole(lambda m, x: torch.softmax(m.wide(x), -1), wide=Wide),
        ["the model (Whole)", "torch.softmax", "no rule"],
    ),
    "a method without a rule": (
        Whole(lambda m, x: m.wide(x).cumsum(-1), wide=Wide),
        ["the model (Whole)", "Tensor.cumsum", "no rule"],
    ),
    "one result for two": (
        Whole(lambda m, x: m.one(x)[0], one=lambda s: GivesOne()),
        ["one (GivesOne)", "gives 1 results, but its boundary declares 2"],
    ),
    "one module fed in two ways": (
        Whole(lambda m, x: m.narrow(x) + m.narrow(m.wide(x)), wide=Wide, narrow=Narrow),
        ["narrow (Narrow) is called more than once", "x_TM"],
    ),
    "the same features divided twice": (
        Whole(lambda m, x: m.narrow(m.both(x)), both=Stacked, narrow=Narrow),
        ["narrow.down (RowLinear)", "takes 6 inputs", "both (Stacked) has 12, in 2 stacked pieces"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_model_is_refused_with_its_modules_and_placements(name: str) -> None:
    model, words = CASES[name]

    def inputs(tracer: Tracer, twin: Module) -> tuple[object, ...]:
        return (tracer.input("T", FEATURES),)

    with pytest.raises(PlacementError) as caught:
        compile_module(model.build, inputs, kernels=kernels(), mesh=Mesh(tp=2))
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)


def test_a_tied_table_is_divided_one_way() -> None:
    @boundary(x_SM=Replicate("tp"), out=Shard("tp", "features"))
    class ByFeatures(Module):
        def __init__(self, embedding: Embedding, selector: KernelSelector) -> None:
            self.table = embedding.table
            self._lookup = selector.select(ops.embedding.lookup)

        def forward(self, x_SM: torch.Tensor) -> torch.Tensor:
            return self._lookup(x_SM, self.table.data)

    class Tied(Module):
        def __init__(self, selector: KernelSelector) -> None:
            self.embedding = tied(selector)
            self.other = ByFeatures(self.embedding, selector)

        def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
            self.embedding(ids_T)
            return self.other(ids_T)

    def inputs(tracer: Tracer, twin: Module) -> tuple[object, ...]:
        return (tracer.input("T", dtype=torch.int64),)

    with pytest.raises(PlacementError) as caught:
        compile_module(Tied, inputs, kernels=kernels(), mesh=Mesh(tp=2))
    assert "other (ByFeatures): reads embedding.table divided by features" in str(caught.value)
    assert "divided by vocabulary" in str(caught.value)


def test_a_layer_may_ask_for_tokens_by_share() -> None:
    @boundary(x_TM=Shard("tp", "tokens"), out=PerToken("tp"))
    class Shares(Module):
        def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
            return x_TM * 2

    program = compile_module(
        lambda _: Whole(lambda m, x: m.part(x), part=lambda s: Shares()).build(kernels()),
        lambda tracer, twin: (tracer.input("T", FEATURES),),
        kernels=kernels(),
        mesh=Mesh(tp=2),
    )
    assert [step.transition.kind for step in program.steps] == ["slice", "all_gather"]
