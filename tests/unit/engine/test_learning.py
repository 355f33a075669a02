"""What drafts cost is learned before the first request, as far as there is time."""

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from tests.support.fake_runner import FakeRunner
from tests.unit.entrypoint.scripted_engine import ScriptedEngine

from tokenspeed import loader
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, EngineConfig, SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import StepPlan, StepWork
from tokenspeed.engine.core import Engine, EngineCore
from tokenspeed.engine.pace import learn_drafts
from tokenspeed.engine.process import EngineProcess
from tokenspeed.engine.server import serve

CONFIG = SchedulerConfig(
    groups=(CacheGroup(pages=64),), slots_max=8, step_tokens_max=64, context_max=512,
    step_drafts_max=8,
)  # fmt: skip


def test_each_length_of_drafts_is_run_and_taught() -> None:
    lengths = []

    class Runner(FakeRunner):
        def launch(self, plan: StepPlan) -> object:  # type: ignore[override]
            lengths.append(len(plan.token_ids) - 1)
            return super().launch(replace(plan, sample_rows=np.zeros(1, dtype=np.int32)))

    control = Scheduler(CONFIG)
    steps = learn_drafts(Runner(), CONFIG, control)  # type: ignore[arg-type]
    assert lengths == [], "nothing is run before it is asked for"
    next(steps)
    assert len(lengths) == 1
    for _ in steps:
        pass
    assert set(lengths) == {0, 1, 2, 4, 8}
    assert control.predict_us(StepWork(decode_rows=1, context_tokens=128)) > 0


def test_without_drafts_nothing_is_learned() -> None:
    config = replace(CONFIG, step_drafts_max=0)
    assert list(learn_drafts(FakeRunner(), config, Scheduler(config))) == []  # type: ignore[arg-type]


def test_requests_and_calls_need_not_wait_until_all_is_learned(smollm2: loader.ModelFiles) -> None:
    async def talk() -> tuple[int, list[int]]:
        command = (sys.executable, "-m", "tests.unit.engine.test_learning")
        engine = await EngineProcess.start(EngineConfig(model=smollm2.path.name), command=command)
        try:
            stats = await engine.client.stats()
            params = SamplingParams(max_new_tokens=4, ignore_eos=True)
            stream = engine.client.generate([1, 2, 3], params)
            return stats.running, [token async for chunk in stream for token in chunk.token_ids]
        finally:
            await engine.stop()

    running, tokens = asyncio.run(asyncio.wait_for(talk(), timeout=60))
    assert running == 0
    assert len(tokens) == 4


def main() -> int:
    """An engine that is never done learning, as `python -m tokenspeed.engine` is called."""
    _, _, socket_path, _, text = sys.argv
    msgspec.json.decode(text, type=EngineConfig)

    def endless() -> Iterator[None]:
        while True:
            yield

    def build(progress: loader.Progress, found: Callable[[Path], None]) -> Engine:
        folder = loader.resolve("smollm2-135m").tokenizer_dir
        found(folder)
        core = EngineCore(
            Scheduler(CONFIG), FakeRunner(), eos_token_ids=(), overlap_depth=0, seed=0
        )
        return Engine(core=core, info=ScriptedEngine(folder).info, learning=endless())

    return serve(build, Path(socket_path), parent_pid=os.getppid())


if __name__ == "__main__":
    sys.exit(main())
