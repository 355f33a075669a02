"""Where each request's time went, and how evenly its tokens came. Counted, never acted on."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenspeed.core.samples import Samples
from tokenspeed.core.step import NO_CUTS, Int32Array, Int64Array, StepPlan, TransferKind

__all__ = ["INTERVAL_BOUNDS_US", "TIMES_COLUMNS", "Launched", "Ledger", "StepClock"]

# What a request does with a stretch of its time; the columns of `_spent`, and on the wire.
CONSTRAINT, QUEUE, RESTORE, PREFILL, STALL, DECODE = range(6)
PHASES = 6
# Of one request that ended: the phases, its first token's time (0 without one), its end.
TIMES_COLUMNS = PHASES + 2
# Of one request that lives: number, the phases, tokens, usual interval, interval of its floor,
# tokens drafted for it, and of these those that were right.
LIVE_COLUMNS = PHASES + 6

# Upper ends of the histogram's buckets, in microseconds: 1, 1.5, 2, 3, 5, 7 times powers of ten.
INTERVAL_BOUNDS_US = tuple(
    int(step * scale)
    for scale in (1_000, 10_000, 100_000, 1_000_000)
    for step in (1, 1.5, 2, 3, 5, 7)
)
_BOUNDS = np.array(INTERVAL_BOUNDS_US, dtype=np.int64)
# Weight of the newest interval in a request's usual one.
_PACE_WEIGHT = 0.1
_ROWS_AT_FIRST = 64
_NO_DRAFTS = np.zeros((0, 3), dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A step under way: when it began, and the ledger's row of each of the plan's rows."""

    plan: StepPlan
    began_us: int
    rows: Int64Array


class Ledger:
    """An account of time for each request from its submission to its end.

    Each microsecond belongs to one phase: a constraint was compiled, the request was queued for a
    slot, its KV was restored from another tier, steps ran its prompt, steps ran its tokens, or it
    stalled (it had begun, and no step took it along). What passes between two steps that both
    take a request along is the later one's. The phases of a request that ended add up to its end
    less its submission, exactly.

    Tokens that a step gives to one request come together: the first ends an interval, the others
    end one of no length. They keep the floor if they came within as many of its intervals.

    A step costs the same few array operations whatever its number of rows, and none where it is
    one row that goes on.

    Args:
        bound_us: the longest interval between tokens that keeps the floor at a context's length,
            None where no floor is held.
    """

    def __init__(self, bound_us: Callable[[int], float | None]) -> None:
        self.intervals = np.zeros(len(INTERVAL_BOUNDS_US) + 1, dtype=np.int64)
        self.intervals_us = 0
        self.floor_violations = 0
        self._bound_us = bound_us
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []
        # Rows whose request ended; a step under way may still name them.
        self._resting: deque[tuple[int, int]] = deque()
        self._row_of_slot = np.zeros(_ROWS_AT_FIRST, dtype=np.int64)
        self._last_launched = -1
        self._rows = 0
        self._spent = np.zeros((0, PHASES), dtype=np.int64)
        self._mark_us = np.zeros(0, dtype=np.int64)
        self._outside = np.zeros(0, dtype=np.int64)
        self._inside = np.zeros(0, dtype=np.int64)
        self._step = np.zeros(0, dtype=np.int64)
        self._tokens = np.zeros(0, dtype=np.int64)
        self._context = np.zeros(0, dtype=np.int64)
        self._first_us = np.zeros(0, dtype=np.int64)
        self._last_us = np.zeros(0, dtype=np.int64)
        self._pace_us = np.zeros(0, dtype=np.float64)
        self._drafted = np.zeros(0, dtype=np.int64)
        self._accepted = np.zeros(0, dtype=np.int64)
        self._request = np.zeros(0, dtype=np.int64)
        # Rows that had drafts in the step that retired last.
        self._guessed: Int64Array | None = None

    def __len__(self) -> int:
        return len(self._row_of)

    def open(self, request: int, *, prompt_count: int, at_us: int, constrained: bool) -> None:
        """Begin an account at the time its request was sent."""
        row = self._take_row()
        self._row_of[request] = row
        self._spent[row] = 0
        self._mark_us[row] = at_us
        self._outside[row] = CONSTRAINT if constrained else QUEUE
        # No step has this number, nor comes right after it.
        self._step[row] = -2
        self._tokens[row] = self._first_us[row] = self._last_us[row] = 0
        self._context[row] = prompt_count
        self._pace_us[row] = 0.0
        self._drafted[row] = self._accepted[row] = 0
        self._request[row] = request

    def queue(self, request: int, now_us: int) -> None:
        """The request's constraint is there: it waits for a slot from now on."""
        row = self._row_of[request]
        self._settle(row, now_us)
        self._outside[row] = QUEUE

    def drop(self, request: int) -> None:
        """Close the account of a request that was refused before it began."""
        if (row := self._row_of.pop(request, None)) is not None:
            self._resting.append((self._last_launched, row))

    def launched(self, plan: StepPlan, now_us: int) -> Launched:
        """Take note of a step that begins."""
        for slot, request in zip(
            plan.bound_slots.tolist(), plan.bound_requests.tolist(), strict=True
        ):
            if slot >= len(self._row_of_slot):
                self._row_of_slot = np.resize(self._row_of_slot, 2 * slot)
            self._row_of_slot[slot] = self._row_of[request]
        transfers = plan.transfers
        for request, kind in zip(
            transfers.requests.tolist(), transfers.kinds.tolist(), strict=True
        ):
            if kind == TransferKind.LOAD and (row := self._row_of.get(request)) is not None:
                self._settle(row, now_us)
                self._outside[row] = RESTORE
        self._last_launched = plan.step
        return Launched(plan=plan, began_us=now_us, rows=self._row_of_slot[plan.row_slots])

    def retired(
        self,
        step: Launched,
        now_us: int,
        tokens: Int32Array,
        cuts: Mapping[int, int] = NO_CUTS,
    ) -> None:
        """Book a step that ended, with the tokens [S] it sampled and the drafts it cut."""
        plan, rows = step.plan, step.rows
        if len(rows) == 1 and self._goes_on(plan, int(rows[0])):
            self._book_alone(plan, int(rows[0]), now_us)
        elif len(rows):
            marks = self._mark_us[rows]
            phases: int | Int64Array = DECODE
            if plan.decode_count < len(rows):
                phases = np.full(len(rows), PREFILL)
                phases[: plan.decode_count] = DECODE
            apart = self._step[rows] != plan.step - 1
            if np.count_nonzero(apart):
                # Time outside of steps ended where this one began.
                late = rows[apart]
                begun = np.maximum(marks[apart], step.began_us)
                self._spent[late, self._outside[late]] += begun - marks[apart]
                marks[apart] = begun
            self._spent[rows, phases] += now_us - marks
            self._mark_us[rows] = now_us
            self._step[rows] = plan.step
            self._outside[rows] = STALL
            self._inside[rows] = phases
            self._book_samples(plan, rows, now_us, tokens, cuts)
        while self._resting and self._resting[0][0] <= plan.step:
            self._free.append(self._resting.popleft()[1])

    def take_drafts(self) -> Int64Array:
        """Of each request that had a draft in the step that retired last, [D, 3]: which it is, and
        how many tokens were drafted for it so far and how many of them were right."""
        guessed, self._guessed = self._guessed, None
        if guessed is None:
            return _NO_DRAFTS
        return np.stack(
            [self._request[guessed], self._drafted[guessed], self._accepted[guessed]], axis=1
        )

    def close(self, requests: list[int], now_us: int) -> Int64Array:
        """End accounts, [F]. Returns [F, TIMES_COLUMNS]."""
        times = np.zeros((len(requests), TIMES_COLUMNS), dtype=np.int64)
        for index, request in enumerate(requests):
            row = self._row_of.pop(request)
            self._settle(row, now_us)
            times[index, :PHASES] = self._spent[row]
            times[index, PHASES] = self._first_us[row]
            times[index, PHASES + 1] = now_us
            self._resting.append((self._last_launched, row))
        return times

    def live(self, now_us: int) -> Int64Array:
        """Accounts of all requests that have not ended, as they stand: [N, LIVE_COLUMNS].

        The usual interval and that of the floor are in microseconds, 0 where there is none.
        """
        found = np.zeros((len(self._row_of), LIVE_COLUMNS), dtype=np.int64)
        for index, (request, row) in enumerate(self._row_of.items()):
            spent = self._spent[row].copy()
            spent[self._phase_now(row)] += max(0, now_us - int(self._mark_us[row]))
            bound_us = self._bound_us(int(self._context[row])) or 0.0
            pace_us = float(self._pace_us[row])
            if pace_us and now_us - self._last_us[row] > 2 * pace_us:
                # It has been waiting for its next token for longer than it used to.
                pace_us = float(now_us - self._last_us[row])
            found[index] = (
                *(request, *spent, self._tokens[row], round(pace_us), round(bound_us)),
                *(self._drafted[row], self._accepted[row]),
            )
        return found

    def _goes_on(self, plan: StepPlan, row: int) -> bool:
        """Whether a step's only row decodes, without a draft, as it did in the step before."""
        return (
            plan.decode_count == 1
            and not plan.has_drafts
            and self._step.item(row) == plan.step - 1
            and self._tokens.item(row) > 0
        )

    def _book_alone(self, plan: StepPlan, row: int, now_us: int) -> None:
        """Book the token of a row that `_goes_on`: for one user, numbers take a third of the time
        of arrays, whose code the weights push out of the caches with each step."""
        self._spent[row, DECODE] += now_us - self._mark_us.item(row)
        self._mark_us[row] = now_us
        self._step[row] = plan.step
        self._outside[row], self._inside[row] = STALL, DECODE
        interval_us = now_us - self._last_us.item(row)
        self.intervals[bisect_left(INTERVAL_BOUNDS_US, interval_us)] += 1
        self.intervals_us += interval_us
        tokens, pace_us = self._tokens.item(row), self._pace_us.item(row)
        apart_us = interval_us - pace_us
        self._pace_us[row] = pace_us + _PACE_WEIGHT * apart_us if tokens > 1 else interval_us
        self._count_violation(interval_us, row)
        self._tokens[row] = tokens + 1
        self._context[row] += 1
        self._last_us[row] = now_us

    def _book_samples(
        self,
        plan: StepPlan,
        rows: Int64Array,
        now_us: int,
        tokens: Int32Array,
        cuts: Mapping[int, int],
    ) -> None:
        if not plan.has_drafts:
            self._book_tokens(rows[plan.sample_rows], now_us)
            return
        drafted = np.diff(plan.query_starts[: plan.decode_count + 1]) - 1
        for slot, guesses in cuts.items():
            drafted[plan.row_slots[: plan.decode_count] == slot] = guesses
        counting = plan.sample_rows[Samples.of(plan).counting(tokens)]
        counts = np.bincount(counting, minlength=len(rows))
        decoding = rows[: plan.decode_count]
        self._drafted[decoding] += drafted
        self._accepted[decoding] += counts[: plan.decode_count] - 1
        self._guessed = decoding[drafted > 0]
        sampled = np.flatnonzero(counts)
        self._book_tokens(rows[sampled], now_us, counts[sampled])

    def _book_tokens(self, rows: Int64Array, now_us: int, given: Int64Array | None = None) -> None:
        """Rows got so many tokens each; one where None."""
        counts = self._tokens[rows]
        begun = counts > 0
        again, of_again = rows, given
        if np.count_nonzero(begun) < len(rows):
            self._first_us[rows[~begun]] = now_us
            again, counts = rows[begun], counts[begun]
            of_again = None if given is None else given[begun]
        if len(again):
            intervals = now_us - self._last_us[again]
            buckets = _BOUNDS.searchsorted(intervals)
            self.intervals += np.bincount(buckets, minlength=len(self.intervals))
            self.intervals_us += int(intervals.sum())
            of_each: npt.NDArray[np.int64 | np.float64] = intervals
            if of_again is not None:
                self.intervals[0] += int(of_again.sum()) - len(again)
                of_each = intervals / of_again
            paces = self._pace_us[again]
            self._pace_us[again] = np.where(
                counts > 1, paces + _PACE_WEIGHT * (of_each - paces), of_each
            )
            self._book_violations(again, of_each)
        self._tokens[rows] += 1 if given is None else given
        self._context[rows] += 1 if given is None else given
        self._last_us[rows] = now_us

    def _book_violations(
        self, rows: Int64Array, intervals: npt.NDArray[np.int64 | np.float64]
    ) -> None:
        """Rows got tokens after so long, for each of them."""
        # No context has a shorter bound than the shortest one.
        shortest_us = self._bound_us(1)
        if shortest_us is None:
            return
        for index in np.flatnonzero(intervals > shortest_us).tolist():
            self._count_violation(float(intervals[index]), int(rows[index]))

    def _count_violation(self, interval_us: float, row: int) -> None:
        bound_us = self._bound_us(self._context.item(row))
        if bound_us is not None and interval_us > bound_us:
            self.floor_violations += 1

    def _settle(self, row: int, now_us: int) -> None:
        passed_us = now_us - int(self._mark_us[row])
        if passed_us > 0:
            self._spent[row, self._phase_now(row)] += passed_us
            self._mark_us[row] = now_us

    def _phase_now(self, row: int) -> int:
        """What the time since a row's mark belongs to."""
        if self._step[row] >= 0 and self._step[row] >= self._last_launched - 1:
            return int(self._inside[row])
        return int(self._outside[row])

    def _take_row(self) -> int:
        if self._free:
            return self._free.pop()
        if self._rows == len(self._spent):
            size = max(_ROWS_AT_FIRST, 2 * self._rows)
            for name in (
                *("_spent", "_mark_us", "_outside", "_inside", "_step"),
                *("_tokens", "_context", "_first_us", "_last_us", "_pace_us"),
                *("_drafted", "_accepted", "_request"),
            ):
                setattr(self, name, _grown(getattr(self, name), size))
        self._rows += 1
        return self._rows - 1


@dataclass(slots=True)
class StepClock:
    """How the time of the engine's steps is divided, in microseconds since its start.

    Attributes:
        plan_us, launch_us, forward_us, commit_us, outputs_us: the parts of a step.
        messages_us: between steps of a busy engine: what came in and went out.
        decode_us, prefill_us, mixed_us: whole steps by what they ran, and so many of them
            (`*_steps`).
    """

    plan_us: int = 0
    launch_us: int = 0
    forward_us: int = 0
    commit_us: int = 0
    outputs_us: int = 0
    messages_us: int = 0
    decode_us: int = 0
    prefill_us: int = 0
    mixed_us: int = 0
    decode_steps: int = 0
    prefill_steps: int = 0
    mixed_steps: int = 0
    _mark_us: int | None = field(default=None, repr=False)

    def begin(self, now_us: int) -> None:
        """A step begins; what passed since the last one of a busy engine went to messages."""
        if self._mark_us is not None:
            self.messages_us += now_us - self._mark_us
        self._mark_us = now_us

    def lap(self, part: str, now_us: int) -> int:
        """What passed since the last call went to a part of the step, by its name here; the time
        again."""
        assert self._mark_us is not None
        setattr(self, part, getattr(self, part) + now_us - self._mark_us)
        self._mark_us = now_us
        return now_us

    def end(self, now_us: int, *, busy: bool) -> None:
        """A step ended; `busy` tells whether another follows at once."""
        self._mark_us = now_us if busy else None

    def book(self, plan: StepPlan, took_us: int) -> None:
        """Count a step by what it ran."""
        rows = len(plan.row_slots)
        if not rows:
            return
        if plan.decode_count == rows:
            self.decode_us += took_us
            self.decode_steps += 1
        elif plan.decode_count == 0:
            self.prefill_us += took_us
            self.prefill_steps += 1
        else:
            self.mixed_us += took_us
            self.mixed_steps += 1


def _grown(array: npt.NDArray[np.generic], size: int) -> npt.NDArray[np.generic]:
    grown = np.zeros((size, *array.shape[1:]), dtype=array.dtype)
    grown[: len(array)] = array
    return grown
