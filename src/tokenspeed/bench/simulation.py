"""Discrete-event simulation of replicas behind routers, in integer microseconds.

Three kinds of event, in this order where times are equal: a request arrives, a step ends, an engine
plans. Groups of replicas share nothing, so each is a simulation of its own.
"""

import heapq
from collections.abc import Callable

import numpy as np

from tokenspeed.bench.config import SimulationConfig
from tokenspeed.bench.replica import Replica
from tokenspeed.bench.results import TIMELINE_US, IntervalCounts, Results
from tokenspeed.bench.router import make_router
from tokenspeed.bench.trace import Trace
from tokenspeed.bench.workload import GroupWorkload, Workload
from tokenspeed.core.errors import ContextOverflow, EngineError
from tokenspeed.core.step import FinishReason, Int64Array, StepOutcome

__all__ = ["Watch", "simulate_group"]

_ARRIVES, _ENDS, _PLANS = range(3)


Watch = Callable[[Int64Array, int], None]
"""Told of each step's tokens: the requests [K] that got one, and when, in microseconds."""


def simulate_group(
    trace: Trace, workload: Workload, group: int, *, watch: Watch | None = None
) -> Results:
    """Run one group of replicas to the end of its requests.

    Raises:
        EngineError: the scheduler came to rest with requests unfinished, ended one twice, or lost
            a page: a bug of the control plane.
    """
    return _Group(trace, workload.group(group), workload.config, group, watch).run()


class _Group:
    def __init__(
        self,
        trace: Trace,
        workload: GroupWorkload,
        config: SimulationConfig,
        group: int,
        watch: Watch | None,
    ) -> None:
        self._watch = watch
        self._trace = trace
        self._workload = workload
        self._closed = config.loop == "closed"
        self._first_replica = sum(map(config.replicas_of, range(group)))
        self._replicas = [
            Replica(workload, config, stream=self._first_replica + index)
            for index in range(config.replicas_of(group))
        ]
        self._router = make_router(config.router, load_bound=config.load_bound)
        self._loads = [0] * len(self._replicas)
        self._plans_at: list[int | None] = [None] * len(self._replicas)
        # Whether the end of a replica's oldest step is among the events.
        self._awaited = [False] * len(self._replicas)
        count = len(workload.sent_us)
        self._replica_of = np.zeros(count, dtype=np.int64)
        self._arrived_us = np.zeros(count, dtype=np.int64)
        self._first_us = np.zeros(count, dtype=np.int64)
        self._last_us = np.zeros(count, dtype=np.int64)
        self._ended_us = np.zeros(count, dtype=np.int64)
        self._emitted = np.zeros(count, dtype=np.int64)
        self._cached = np.zeros(count, dtype=np.int64)
        self._reasons = np.zeros(count, dtype=np.int64)
        self._intervals = IntervalCounts()
        self._timeline: dict[int, int] = {}
        self._events: list[tuple[int, int, int]] = []

    def run(self) -> Results:
        events = self._events
        follow = set(self._workload.followers.values())
        events += [
            (sent_us, _ARRIVES, request)
            for request, sent_us in enumerate(self._workload.sent_us.tolist())
            if request not in follow
        ]
        heapq.heapify(events)
        while events:
            now_us, kind, index = heapq.heappop(events)
            if kind == _ARRIVES:
                self._arrive(index, now_us)
            elif kind == _ENDS:
                replica = self._replicas[index]
                replica.commit()
                self._awaited[index] = False
                self._note(index, replica.take_outcome(), now_us)
                self._plan_soon(index, now_us)
            else:
                self._plans_at[index] = None
                self._plan(index, now_us)
        return self._result()

    def _arrive(self, request: int, now_us: int) -> None:
        workload = self._workload
        entry = self._trace.requests[int(workload.trace_index[request])]
        chosen = self._router.choose(entry, int(workload.copy[request]), self._loads)
        self._arrived_us[request] = now_us
        self._replica_of[request] = chosen
        try:
            self._replicas[chosen].submit(request)
        except ContextOverflow:
            self._end(request, FinishReason.REJECTED, now_us)
            return
        self._loads[chosen] += 1
        self._plan_soon(chosen, now_us)

    def _plan_soon(self, index: int, now_us: int) -> None:
        """Plan once everything else of this moment has happened."""
        if self._plans_at[index] != now_us:
            self._plans_at[index] = now_us
            heapq.heappush(self._events, (now_us, _PLANS, index))

    def _plan(self, index: int, now_us: int) -> None:
        replica = self._replicas[index]
        if not replica.launch(now_us):
            # What was refused or fills the pool alone ended while it was planned.
            self._note(index, replica.take_outcome(), now_us)
        end_us = replica.next_end_us
        if end_us is not None and not self._awaited[index]:
            self._awaited[index] = True
            heapq.heappush(self._events, (end_us, _ENDS, index))

    def _note(self, index: int, outcome: StepOutcome, now_us: int) -> None:
        requests = outcome.requests
        if len(requests):
            if self._watch is not None:
                self._watch(requests, now_us)
            before = self._emitted[requests]
            self._emitted[requests] = before + 1
            intervals_us = now_us - self._last_us[requests]
            self._last_us[requests] = now_us
            if before.all():
                self._intervals.add(intervals_us)
            else:
                fresh = before == 0
                self._first_us[requests[fresh]] = now_us
                self._cached[requests[fresh]] = outcome.cached_counts[fresh]
                self._intervals.add(intervals_us[~fresh])
            second = now_us // TIMELINE_US
            self._timeline[second] = self._timeline.get(second, 0) + len(requests)
        if len(outcome.finished):
            self._loads[index] -= len(outcome.finished)
            for request, reason in zip(
                outcome.finished.tolist(), outcome.reasons.tolist(), strict=True
            ):
                self._end(request, reason, now_us)

    def _end(self, request: int, reason: int, now_us: int) -> None:
        if self._reasons[request]:
            raise EngineError(f"request {request} of the simulation ended twice")
        self._reasons[request] = reason
        self._ended_us[request] = now_us
        follower = self._workload.followers.get(request)
        if follower is not None:
            at_us = now_us + int(self._workload.gap_us[follower])
            heapq.heappush(self._events, (at_us, _ARRIVES, follower))

    def _result(self) -> Results:
        (unfinished,) = np.nonzero(self._reasons == 0)
        if len(unfinished):
            raise EngineError(
                f"the scheduler came to rest with {len(unfinished)} requests unfinished, "
                f"{unfinished[0]} first"
            )
        assert (self._emitted <= self._workload.output_tokens).all()
        stats = [replica.close() for replica in self._replicas]
        interval_us, interval_counts = self._intervals.total()
        timeline = np.zeros(max(self._timeline, default=-1) + 1, dtype=np.int64)
        for second, count in self._timeline.items():
            timeline[second] = count
        workload = self._workload
        return Results(
            trace_index=workload.trace_index,
            copy=workload.copy,
            turn=workload.turn,
            input_tokens=workload.input_tokens,
            output_tokens=workload.output_tokens,
            replica=self._replica_of + self._first_replica,
            arrived_us=self._arrived_us,
            first_us=self._first_us,
            last_us=self._last_us,
            ended_us=self._ended_us,
            emitted=self._emitted,
            cached=self._cached,
            reasons=self._reasons,
            interval_us=interval_us,
            interval_counts=interval_counts,
            timeline=timeline,
            busy_us=_column([replica.busy_us for replica in self._replicas]),
            steps=_column([entry.steps for entry in stats]),
            retractions=_column([entry.retractions for entry in stats]),
            evictions=_column([entry.evictions for entry in stats]),
        )


def _column(values: list[int]) -> Int64Array:
    return np.array(values, dtype=np.int64)
