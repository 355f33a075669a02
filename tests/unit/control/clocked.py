"""A scheduler on a machine whose steps take a known time, for what the scheduler does with time."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.scenario.simulation import i32
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, CachePolicy
from tokenspeed.core.step import FinishReason, StepPlan, StepWork

__all__ = ["Machine", "p99"]


def p99(values: list[int]) -> int:
    """The value that 99 of 100 do not exceed."""
    return sorted(values)[min(len(values) - 1, len(values) * 99 // 100)]


class Machine:
    """Steps of 3 ms and, for each thing they run, some microseconds; times are in microseconds.

    Attributes:
        intervals: by request, the times between its tokens.
        first: by request, the time from its submission to its first token.
        row_us: what a decode row takes.
        finished, retries_ms: by request, how it ended, and when it may come back.
    """

    def __init__(self, *, noise: float = 0.0, seed: int = 0, **changes: Any) -> None:
        config = {
            "groups": (CacheGroup(pages=changes.pop("pages", 20_000)),),
            "page_size": 32,
            "slots_max": 64,
            "step_tokens_max": 2048,
            "context_max": 100_000,
            "overlap_depth": 0,
            "prefix_cache": True,
            "cache_policy": CachePolicy.SESSION,
            "tps_floor": None,
            "queue_timeout_us": None,
            "step_drafts_max": 0,
            "step_proposals_max": 0,
            "proposal_length_max": 0,
            "proposal_window": 0,
            "draft_memory_size_bytes": 2**29,
        }
        self.scheduler = Scheduler(SimpleNamespace(**{**config, **changes}))
        self.now_us = 0
        self.intervals: dict[int, list[int]] = {}
        self.first: dict[int, int] = {}
        self.finished: dict[int, FinishReason] = {}
        self.retries_ms: dict[int, int] = {}
        self.prefilled = 0
        self.row_us = 20.0
        self.context_token_us = 0.002
        self._noise = noise
        self._random = random.Random(seed)
        self._submitted: dict[int, int] = {}
        self._last: dict[int, int] = {}

    def time_us(self, work: StepWork) -> int:
        """What a step takes."""
        time_us = 3000 + 20.0 * work.prefill_tokens + self.row_us * work.decode_rows
        time_us += self.context_token_us * work.context_tokens + 5e-5 * work.prefill_pairs
        return int(time_us * self._random.lognormvariate(0.0, self._noise))

    def submit(
        self,
        request: int,
        tokens: int,
        outputs: int,
        *,
        like: int | None = None,
        shared: int = 640,
        **wishes: int,
    ) -> None:
        """A prompt that shares nothing with any other, or its first tokens with `like`."""
        prompt = np.arange(tokens, dtype=np.int32) + 1000 * (request + 1)
        if like is not None:
            prompt[:shared] = np.arange(shared, dtype=np.int32) + 1000 * (like + 1)
        self._submitted[request] = self.now_us
        self.scheduler.submit(
            request, prompt, max_new_tokens=outputs, stop_token_ids=i32(), **wishes
        )

    def step(self) -> StepPlan | None:
        """One turn of the engine loop."""
        plan = self.scheduler.plan(self.now_us)
        if plan is not None:
            work = StepWork.of(plan)
            self.now_us += self.time_us(work)
            self.prefilled += work.prefill_tokens
            tokens = np.full(len(plan.sample_rows), 7, dtype=np.int32)
            self.scheduler.commit(plan.step, tokens, self.now_us)
        outcome = self.scheduler.take_outcome()
        for request in outcome.requests.tolist():
            if request in self._last:
                self.intervals.setdefault(request, []).append(self.now_us - self._last[request])
            else:
                self.first[request] = self.now_us - self._submitted[request]
            self._last[request] = self.now_us
        for request, reason, retry_ms in zip(
            outcome.finished.tolist(),
            outcome.reasons.tolist(),
            outcome.retries_ms.tolist(),
            strict=True,
        ):
            self.finished[request] = FinishReason(reason)
            self.retries_ms[request] = retry_ms
        return plan

    def steps(self, count: int) -> list[StepPlan]:
        """So many turns."""
        return [plan for _ in range(count) if (plan := self.step()) is not None]

    def run_until(self, *requests: int) -> None:
        """Until these have ended."""
        while not all(request in self.finished for request in requests):
            assert self.step() is not None or all(r in self.finished for r in requests)

    def warm(self) -> None:
        """Lets the scheduler learn what steps take."""
        for index, tokens in enumerate((50, 200, 800, 3200, 9000)):
            request = 1_000_000 + index
            self.submit(request, tokens, 20)
            self.run_until(request)
        self.submit(1_000_010, 300, 20)
        self.submit(1_000_011, 300, 20)
        self.run_until(1_000_010, 1_000_011)
        self.first.clear()
        self.intervals.clear()
        self.finished.clear()
