"""The engine alone is measured as its steps take time."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tests.support.fake_runner import FakeRunner
from tokenspeed.bench.offline import OfflinePlan, measure_offline
from tokenspeed.cli.main import app
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, EngineConfig, SchedulerConfig
from tokenspeed.core.errors import ConfigError, EngineError
from tokenspeed.core.step import StepPlan
from tokenspeed.engine.core import EngineCore


class TimedRunner(FakeRunner):
    """A step takes 2 ms and 10 µs for each of its tokens, on a clock of its own."""

    def __init__(self) -> None:
        super().__init__(slots_max=8)
        self.now_s = 5.0

    def launch(self, plan: StepPlan) -> SimpleNamespace:
        self.now_s += 0.002 + 1e-5 * len(plan.token_ids)
        return super().launch(plan)


def measured(plan: OfflinePlan, **scheduler: int) -> dict[tuple[str, int, int], tuple[float, ...]]:
    runner = TimedRunner()
    config = SchedulerConfig(
        groups=(CacheGroup(pages=scheduler.pop("pages", 200)),),
        slots_max=8,
        step_tokens_max=512,
        context_max=1024,
        overlap_depth=0,
        **scheduler,
    )
    core = EngineCore(Scheduler(config), runner, eos_token_ids=(), overlap_depth=0, seed=0)
    rows = measure_offline(core, plan, clock=lambda: runner.now_s)
    return {(row.work, row.tokens, row.users): row.tokens_per_s.values for row in rows}


def test_rates_are_those_of_the_steps() -> None:
    plan = OfflinePlan(
        prefill=(100, 600), decode=(16,), batch=(1, 4), batch_depth=32, new_tokens=9, repeats=2
    )
    found = measured(plan)
    assert list(found) == list(plan.works)
    # The second prompt takes two steps.
    assert found["prefill", 100, 1] == pytest.approx([100 / 0.003] * 2)
    assert found["prefill", 600, 1] == pytest.approx([600 / 0.010] * 2)
    assert found["decode", 16, 1] == pytest.approx([1 / 0.00201] * 2)
    assert found["batch", 32, 1] == pytest.approx([1 / 0.00201] * 2)
    assert found["batch", 32, 4] == pytest.approx([4 / 0.00204] * 2)


def test_steps_that_still_carry_prompts_do_not_count_as_decoding() -> None:
    plan = OfflinePlan(prefill=(), decode=(), batch=(4,), batch_depth=400, new_tokens=30, repeats=1)
    # Prompts come one by one: the first users decode beside the later ones' prompts.
    assert measured(plan)["batch", 400, 4] == pytest.approx([4 / 0.00204])


def test_users_who_do_not_decode_together_are_no_batch() -> None:
    plan = OfflinePlan(prefill=(), decode=(), batch=(2,), batch_depth=600, new_tokens=2, repeats=1)
    with pytest.raises(EngineError, match="--new-tokens"):
        measured(plan, pages=24)


def test_an_engine_gets_room_for_the_plan_and_no_prefix_cache() -> None:
    plan = OfflinePlan(prefill=(2048,), decode=(64,), batch=(1, 8), new_tokens=10)
    config = plan.configure(EngineConfig(model="m", threads=2))
    assert (config.max_running, config.max_context, config.prefix_cache) == (8, 2058, False)
    assert config.threads == 2
    assert config.max_step_tokens == EngineConfig(model="m").max_step_tokens
    many = OfflinePlan(batch=(1000,)).configure(EngineConfig(model="m", max_step_tokens=512))
    assert (many.max_running, many.max_step_tokens) == (1000, 1000)
    asked = dataclasses.replace(EngineConfig(model="m"), max_context=4096)
    assert plan.configure(asked).max_context == 4096
    with pytest.raises(ConfigError, match="--prefill"):
        OfflinePlan(prefill=(), decode=(), batch=())


def test_a_real_model_is_measured() -> None:
    line = ["bench", "offline", "smollm2-135m", "--prefill", "32", "--decode", "16"]
    line += ["--batch", "2", "--batch-depth", "16", "--new-tokens", "4", "--repeats", "2", "--json"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["work"], row["tokens"], row["users"]) for row in rows] == [
        ("prefill", 32, 1),
        ("decode", 16, 1),
        ("batch", 16, 2),
    ]
    assert all(len(row["tokens_per_s"]["values"]) == 2 for row in rows)
