"""The engine and requests whose answers are confined: before they begin, and when they fail."""

import select
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from tests.support.fake_runner import FakeRunner
from tests.support.grammars import SLOW, compiler

from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, SchedulerConfig
from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.core.errors import InvalidParameter
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import FinishReason, StepPlan, StepResult
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.wire import Refused, Submit
from tokenspeed.grammar import Grammar

EOS = 9
PAGES = 32


class FailingRunner(FakeRunner):
    """Fails the slot of request 1 with its third step."""

    def launch(self, plan: StepPlan) -> SimpleNamespace:
        result = super().launch(plan).result()
        failures = {0: "too complex"} if plan.step == 3 else {}
        failed = StepResult(tokens=result.tokens, logprobs=None, failures=failures)
        return SimpleNamespace(result=lambda: failed)


def engine(runner: FakeRunner | None = None, *, overlap_depth: int = 0) -> EngineCore:
    config = SchedulerConfig(
        groups=(CacheGroup(pages=PAGES),), page_size=4, context_max=64, overlap_depth=overlap_depth
    )
    return EngineCore(
        Scheduler(config),
        runner or FakeRunner(),
        eos_token_ids=(EOS,),
        overlap_depth=overlap_depth,
        seed=0,
        constraints=compiler(),
    )


@pytest.fixture
def core() -> Iterator[EngineCore]:
    made = engine()
    yield made
    made.close()


def submit(
    core: EngineCore, request: int, constraint: StructuredOutputs | None, **params: object
) -> None:
    core.submit(
        Submit(
            request=request,
            prompt=np.arange(6, dtype=np.int32).tobytes(),
            params=SamplingParams(structured_outputs=constraint, **params),  # type: ignore[arg-type]
            max_new_tokens=5,
            seed=0,
            salt=0,
            priority=0,
            tenant=None,
        )
    )


def run(core: EngineCore) -> tuple[dict[int, FinishReason], list[Refused]]:
    """Step until nothing is left."""
    ended: dict[int, FinishReason] = {}
    refused: list[Refused] = []
    while not core.idle:
        core.wait(30)
        outputs = core.step()
        refused += core.take_refused()
        if outputs is not None:
            requests = np.frombuffer(outputs.finished, dtype=np.int64).tolist()
            reasons = np.frombuffer(outputs.reasons, dtype=np.int32).tolist()
            ended |= {r: FinishReason(why) for r, why in zip(requests, reasons, strict=True)}
    return ended, refused


def test_a_confined_request_begins_with_its_grammar_and_ends_at_an_end(core: EngineCore) -> None:
    submit(core, 1, StructuredOutputs(regex="a+"), ignore_eos=True, min_new_tokens=5)
    ended, refused = run(core)
    assert (ended, refused) == ({1: FinishReason.LENGTH}, [])
    bound = core.runner.bound[0]  # type: ignore[attr-defined]
    assert isinstance(bound["grammar"], Grammar)
    assert bound["tokens"].tolist() == list(range(6))
    # Sampled ends are meant, whatever else was asked for: the sampler keeps the others away.
    assert bound["stop_token_ids"].tolist() == [EOS]
    scripted = engine(FakeRunner(script={2: EOS}))
    submit(scripted, 1, StructuredOutputs(regex="a+"), ignore_eos=True, min_new_tokens=5)
    assert run(scripted)[0] == {1: FinishReason.STOP}
    scripted.close()


def test_a_request_that_is_compiled_holds_no_page_and_others_go_on(core: EngineCore) -> None:
    submit(core, 1, SLOW)
    submit(core, 2, None)
    while core.busy:
        core.step()
    stats = core.control.stats()
    assert (stats.waiting, stats.running, stats.pages_active) == (0, 0, 0)
    assert not core.idle
    core.abort(1)
    assert [item.request for item in core.take_refused()] == [1]
    assert core.idle
    core.abort(1)
    assert core.idle


def test_what_cannot_be_enforced_never_begins(core: EngineCore) -> None:
    submit(core, 1, StructuredOutputs(json={"uniqueItems": True}))
    ended, (refused,) = run(core)
    assert ended == {}
    assert (refused.request, refused.kind) == (1, InvalidParameter.__name__)
    assert "uniqueItems" in refused.message
    assert core.control.stats().steps == 0


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_a_request_that_fails_on_its_way_ends_with_the_reason(overlap_depth: int) -> None:
    core = engine(FailingRunner(), overlap_depth=overlap_depth)
    submit(core, 1, StructuredOutputs(regex="a+"))
    core.wait(30)
    while core.control.stats().running == 0:
        core.step()
    submit(core, 2, None)
    ended, refused = run(core)
    assert [(item.request, "too complex" in item.message) for item in refused] == [(1, True)]
    assert ended == {1: FinishReason.ABORT, 2: FinishReason.LENGTH}
    core.control.audit()
    assert core.control.stats().pages_active == 0
    core.close()


def test_an_engine_without_a_compiler_refuses() -> None:
    config = SchedulerConfig(groups=(CacheGroup(pages=PAGES),), context_max=64)
    core = EngineCore(Scheduler(config), FakeRunner(), eos_token_ids=(), overlap_depth=0, seed=0)
    with pytest.raises(InvalidParameter, match="constraints"):
        submit(core, 1, StructuredOutputs(regex="a"))


def test_ready_grammars_wake_an_engine_that_waits(core: EngineCore) -> None:
    submit(core, 1, StructuredOutputs(regex="a"))
    assert core.wake_descriptor is not None
    assert not core.busy
    core.wait(30)
    core.step()
    assert core.busy


def test_a_grammar_that_comes_after_its_request_left_wakes_the_engine_once(
    core: EngineCore,
) -> None:
    submit(core, 1, StructuredOutputs(regex="a"))
    core.wait(30)
    core.abort(1)
    core.take_refused()
    assert core.idle
    core.step()
    assert core.wake_descriptor is not None
    assert select.select([core.wake_descriptor], [], [], 0) == ([], [], [])
