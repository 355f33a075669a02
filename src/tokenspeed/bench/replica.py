"""One engine in virtual time: the real scheduler, and step times in place of a device."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from tokenspeed.bench.config import SimulationConfig
from tokenspeed.bench.hardware import StepTime
from tokenspeed.bench.workload import GroupWorkload
from tokenspeed.control import Scheduler
from tokenspeed.core.stats import SchedulerStats
from tokenspeed.core.step import Int32Array, StepOutcome, StepPlan, StepWork

__all__ = ["Replica"]

_NO_STOP = np.zeros(0, dtype=np.int32)
_NOISE_BLOCK = 4096


@dataclass(slots=True, kw_only=True)
class _Flight:
    step: int
    end_us: int
    tokens: Int32Array


class Replica:
    """The engine's loop (plan, launch, commit) against a clock that only steps move.

    Attributes:
        busy_us: time in which a step ran.
        outstanding: requests submitted and not ended.
    """

    def __init__(self, workload: GroupWorkload, config: SimulationConfig, *, stream: int) -> None:
        """`stream` sets this replica's jitter apart from the others'."""
        self._workload = workload
        self._scheduler = Scheduler(config.scheduler)
        self._step_time = config.step_time
        _teach(self._scheduler, config.step_time)
        self._depth = config.scheduler.overlap_depth
        self._flights: deque[_Flight] = deque()
        # Where the answer of each slot's request begins, once a request has the slot.
        self._answers = np.zeros(config.scheduler.slots_max, dtype=np.int64)
        self._noise = _Noise(config.jitter, config.seed, stream) if config.jitter else None
        self.busy_us = 0
        self.outstanding = 0

    @property
    def next_end_us(self) -> int | None:
        """When the oldest step in flight ends."""
        return self._flights[0].end_us if self._flights else None

    def submit(self, request: int) -> None:
        """Queue a request of the workload. Raises RequestError where it can not be taken."""
        workload = self._workload
        self._scheduler.submit(
            request,
            workload.prompt(request),
            max_new_tokens=int(workload.output_tokens[request]),
            stop_token_ids=_NO_STOP,
            salt=int(workload.copy[request]),
            tenant=int(workload.copy[request]),
        )
        self.outstanding += 1

    def launch(self, now_us: int) -> bool:
        """Plan and start as many steps as may be in flight; whether any was."""
        launched = False
        while len(self._flights) <= self._depth:
            plan = self._scheduler.plan(now_us)
            if plan is None:
                break
            launched = True
            took_us = self._time_us(plan)
            begin_us = max(now_us, self._flights[-1].end_us) if self._flights else now_us
            self.busy_us += took_us
            self._flights.append(
                _Flight(step=plan.step, end_us=begin_us + took_us, tokens=self._sample(plan))
            )
        return launched

    def commit(self) -> None:
        """Retire the oldest step in flight."""
        flight = self._flights.popleft()
        self._scheduler.commit(flight.step, flight.tokens, flight.end_us)

    def take_outcome(self) -> StepOutcome:
        """What happened to requests since the last call."""
        outcome = self._scheduler.take_outcome()
        self.outstanding -= len(outcome.finished)
        return outcome

    def close(self) -> SchedulerStats:
        """Check that every page is accounted for; the scheduler's last word."""
        self._scheduler.audit()
        return self._scheduler.stats()

    def _time_us(self, plan: StepPlan) -> int:
        took_us = self._step_time.predict_us(StepWork.of(plan))
        if self._noise is not None:
            took_us *= self._noise.draw()
        # A step of no time would let the clock stand still.
        return max(1, round(took_us))

    def _sample(self, plan: StepPlan) -> Int32Array:
        """[S] the recorded tokens in place of sampled ones."""
        if len(plan.bound_slots):
            self._answers[plan.bound_slots] = self._workload.output_starts[plan.bound_requests]
        slots = plan.row_slots[plan.sample_rows]
        tokens: Int32Array = self._workload.flat[self._answers[slots] + plan.sample_positions]
        return tokens


def _teach(scheduler: Scheduler, step_time: StepTime) -> None:
    """What an engine learns of its machine before the first request: prompts of doubling length,
    alone, each followed by some decode steps, then those of four users."""
    for tokens in (16, 32, 64, 128, 256, 512):
        _observe(scheduler, step_time, StepWork(prefill_tokens=tokens, prefill_pairs=tokens**2 / 2))
        for context in range(tokens, tokens + 12):
            _observe(scheduler, step_time, StepWork(decode_rows=1, context_tokens=context))
    for context in range(16, 28):
        _observe(scheduler, step_time, StepWork(decode_rows=4, context_tokens=4 * context))


def _observe(scheduler: Scheduler, step_time: StepTime, work: StepWork) -> None:
    scheduler.observe(work, max(1, round(step_time.predict_us(work))))


class _Noise:
    """Factors with a mean logarithm of zero, drawn in blocks."""

    def __init__(self, sigma: float, seed: int, stream: int) -> None:
        self._sigma = sigma
        self._rng = np.random.Generator(np.random.Philox(key=[seed, stream]))
        self._left: list[float] = []

    def draw(self) -> float:
        if not self._left:
            drawn = self._rng.standard_normal(_NOISE_BLOCK)
            self._left = np.exp(self._sigma * drawn).tolist()
        return self._left.pop()
