"""Fits the simulator's step-time model to the engine on this machine.

Runs prompts of several lengths, one to eight at a time, with a few answer tokens each, on the real
engine in this process, and takes the time of every forward pass. Each load is run several times
and a step's fastest time counts, so that what else the machine does is left out. Prints the costs,
how far the model is from what was measured, and the `--step-time` flags that set it.
"""

import argparse
import time
from typing import Any

import numpy as np

from tokenspeed import SamplingParams
from tokenspeed.bench.fitting import fit_step_time
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.step import StepPlan, StepWork
from tokenspeed.engine.build import build_engine
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.wire import Submit

ANSWER_TOKENS = 8
USERS = (1, 2, 4, 8)


class TimedRunner:
    """Passes everything on, and takes the time of every forward pass."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.steps: list[tuple[StepWork, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, plan: StepPlan) -> Any:
        began_s = time.perf_counter()
        launched = self._runner.launch(plan)
        launched.result()
        self.steps.append((StepWork.of(plan), (time.perf_counter() - began_s) * 1e6))
        return launched


def run(core: EngineCore, timed: TimedRunner, prompts: list[np.ndarray]) -> list[Any]:
    """The steps of one load."""
    timed.steps = []
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    for request, prompt in enumerate(prompts):
        core.submit(Submit(request, prompt.tobytes(), params, ANSWER_TOKENS, None, 0, 0, None))
    while core.busy:
        core.step()
    core.control.flush_cache()
    return timed.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 256, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    engine = build_engine(
        EngineConfig(
            model=options.model,
            threads=options.threads,
            max_running=8,
            overlap_depth=0,
            seed=0,
            speculate="off",
        )
    )
    core = engine.core
    timed = TimedRunner(core.runner)
    core.runner = timed
    rng = np.random.Generator(np.random.Philox(0))
    observed: list[tuple[StepWork, float]] = []
    for users in USERS:
        for length in options.prompts:
            prompts = [
                rng.integers(0, engine.info.vocab_size, length, dtype=np.int32)
                for _ in range(users)
            ]
            runs = [run(core, timed, prompts) for _ in range(options.repeats)]
            for same in zip(*runs, strict=True):
                assert len({load for load, _ in same}) == 1, "equal loads must plan equal steps"
                observed.append((same[0][0], min(took for _, took in same)))
    core.close()
    model = fit_step_time(observed)
    errors = [abs(model.predict_us(load) / took - 1) for load, took in observed]
    costs = {name: getattr(model, name) for name in model.__slots__}
    print(f"{engine.info.model_name}, {engine.info.dtype}, {len(observed)} steps")
    for name, cost in costs.items():
        print(f"{name:>17} {cost:12.4f}")
    print(f"relative error: median {np.median(errors):.1%}, p90 {np.percentile(errors, 90):.1%}")
    print(*(f"--step-time {name.removesuffix('_us')}={cost:.4g}" for name, cost in costs.items()))


if __name__ == "__main__":
    main()
