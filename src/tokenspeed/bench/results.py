"""What a simulation found, in columns: of one group of replicas, or of all together."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from tokenspeed.core.step import Int64Array

__all__ = ["TIMELINE_US", "IntervalCounts", "Results", "merge_results"]

TIMELINE_US = 1_000_000
_INTERVAL_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What became of R requests, and of P replicas. All columns are int64.

    Attributes:
        trace_index, copy: [R] the request of the trace and the copy it is from.
        turn, input_tokens, output_tokens: [R] what was asked for.
        replica: [R] who served each.
        arrived_us, first_us, last_us, ended_us: [R] times; `first_us` and `last_us` are of tokens
            and mean nothing where `emitted` is 0.
        emitted: [R] tokens given.
        cached: [R] prompt tokens that came from cache when the request was first admitted.
        reasons: [R] `FinishReason`.
        interval_us, interval_counts: [I] times between two tokens of a request, ascending, and how
            often each was.
        timeline: [T] tokens given in each second.
        busy_us: [P] time in which a step ran.
        steps, retractions, evictions: [P] of each replica's scheduler.
    """

    trace_index: Int64Array
    copy: Int64Array
    turn: Int64Array
    input_tokens: Int64Array
    output_tokens: Int64Array
    replica: Int64Array
    arrived_us: Int64Array
    first_us: Int64Array
    last_us: Int64Array
    ended_us: Int64Array
    emitted: Int64Array
    cached: Int64Array
    reasons: Int64Array
    interval_us: Int64Array
    interval_counts: Int64Array
    timeline: Int64Array
    busy_us: Int64Array
    steps: Int64Array
    retractions: Int64Array
    evictions: Int64Array

    def to_bytes(self) -> bytes:
        """For another process of ours."""
        buffer = io.BytesIO()
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez(buffer, allow_pickle=False, **columns)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> "Results":
        """What `to_bytes` wrote."""
        with np.load(io.BytesIO(data), allow_pickle=False) as columns:
            return Results(**{name: columns[name] for name in columns.files})


def merge_results(parts: Sequence[Results]) -> Results:
    """The results of all groups together, in the order given."""
    columns = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(Results)
        if field.name not in ("interval_us", "interval_counts", "timeline")
    }
    interval_us, interval_counts = _merge_counts(
        [(part.interval_us, part.interval_counts) for part in parts]
    )
    timeline = np.zeros(max(len(part.timeline) for part in parts), dtype=np.int64)
    for part in parts:
        timeline[: len(part.timeline)] += part.timeline
    return Results(
        **columns, interval_us=interval_us, interval_counts=interval_counts, timeline=timeline
    )


class IntervalCounts:
    """Counts whole microseconds exactly, in bounded memory as long as few differ."""

    def __init__(self) -> None:
        self._pending: list[Int64Array] = []
        self._pending_count = 0
        self._values = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, intervals_us: Int64Array) -> None:
        """Count some more."""
        self._pending.append(intervals_us)
        self._pending_count += len(intervals_us)
        if self._pending_count > _INTERVAL_BLOCK:
            self._fold()

    def total(self) -> tuple[Int64Array, Int64Array]:
        """Values, ascending, and how often each was."""
        self._fold()
        return self._values, self._counts

    def _fold(self) -> None:
        values, counts = np.unique(
            np.concatenate([np.zeros(0, dtype=np.int64), *self._pending]), return_counts=True
        )
        self._pending, self._pending_count = [], 0
        self._values, self._counts = _merge_counts(
            [(self._values, self._counts), (values, counts.astype(np.int64))]
        )


def _merge_counts(parts: list[tuple[Int64Array, Int64Array]]) -> tuple[Int64Array, Int64Array]:
    values, places = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    counts = np.zeros(len(values), dtype=np.int64)
    np.add.at(counts, places, np.concatenate([part[1] for part in parts]))
    return values, counts
