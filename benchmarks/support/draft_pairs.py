"""Steps with drafts and without in turn, so that both meet the same machine."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.support.draft_loads import Asked, Forcing
from tokenspeed import SamplingParams
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.wire import Submit

__all__ = ["Pairs", "measure_pairs"]


@dataclass
class Pairs:
    """Pairs of steps that decode: one with drafts, one without.

    Attributes:
        wall_s, cpu_s: [N, 2] of each pair, with drafts first; CPU time of all threads.
        drafted: tokens.
    """

    wall_s: np.ndarray
    cpu_s: np.ndarray
    drafted: int

    def summary(self) -> dict[str, float | int]:
        """The speed with drafts over that without: medians of pairs with what chance leaves open
        (95%, by drawing the pairs anew), and the means, in which rare steps count."""
        dice = np.random.default_rng(0)
        found: dict[str, float | int] = {"pairs": len(self.wall_s), "drafted_tokens": self.drafted}
        for name, times in (("wall", self.wall_s), ("cpu", self.cpu_s)):
            ratios = times[:, 1] / times[:, 0]
            again = [
                float(np.median(ratios[dice.integers(0, len(ratios), len(ratios))]))
                for _ in range(1000)
            ]
            found[f"{name}_ratio"] = statistics.median(ratios.tolist())
            found[f"{name}_ratio_low"], found[f"{name}_ratio_high"] = np.percentile(
                again, [2.5, 97.5]
            ).tolist()
            found[f"{name}_ratio_of_means"] = float(times[:, 1].mean() / times[:, 0].mean())
        return found


def measure_pairs(
    made: Callable[[bool], tuple[EngineCore, Forcing]], users: Sequence[Sequence[Asked]]
) -> Pairs:
    """Have two engines over one runner take their steps in turn.

    They write to the same pages. What is in them does not matter, since answers are forced.

    Args:
        made: an engine with drafts, or without, and what forces its answers.
        users: turns of each, with answers; all users take each turn together.
    """
    engines = [made(drafts) for drafts in (True, False)]
    before = engines[0][0].control.stats().drafted_tokens
    walls: list[list[float]] = []
    cpus: list[list[float]] = []
    number = 0
    for turns in zip(*users, strict=True):
        for asked in turns:
            number += 1
            assert asked.answer is not None
            prompt = np.array(asked.prompt, dtype=np.int32).tobytes()
            params = SamplingParams(temperature=0.0, ignore_eos=True)
            for core, forcing in engines:
                forcing.force(number, asked.answer)
                core.submit(Submit(number, prompt, params, asked.output_max, number, 0, 0, None))
        while not any(core.idle for core, _ in engines):
            wall_s, cpu_s, decodes = [0.0, 0.0], [0.0, 0.0], True
            for index in (0, 1) if len(walls) % 2 else (1, 0):
                began_s, began_cpu_s = time.perf_counter(), time.process_time()
                outputs = engines[index][0].step()
                wall_s[index] = time.perf_counter() - began_s
                cpu_s[index] = time.process_time() - began_cpu_s
                tokens = 0 if outputs is None else len(outputs.requests) // 8
                decodes = decodes and tokens == len(turns) and not outputs.admitted
            if decodes:
                walls.append(wall_s)
                cpus.append(cpu_s)
        for core, _ in engines:
            while not core.idle:
                core.step()
    drafted = engines[0][0].control.stats().drafted_tokens - before
    return Pairs(np.array(walls), np.array(cpus), drafted)
