"""Goes through numbers of users and repeats, and keeps each run as it ends."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tokenspeed.bench.live.client import ChatClient
from tokenspeed.bench.live.processes import ProcessMeter
from tokenspeed.bench.live.records import AnswerRecord, Run
from tokenspeed.bench.live.replay import Pass, calibrate, replay, warm_up
from tokenspeed.bench.live.store import RunStore
from tokenspeed.bench.sessions import Workload

__all__ = ["Sweep", "Watcher", "digest", "missing", "sweep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Which runs there are.

    Attributes:
        levels: numbers of users; (None,) for an open loop.
        repeats: of each. All levels are run before any is repeated, so that what drifts on the
            machine meets all alike.
        each: how a run goes; its `users` and `repeat` are filled in.
        pids: of the server's processes; empty if they are not known.
        warm: whether to warm up and calibrate before the first run.
    """

    levels: tuple[int | None, ...]
    repeats: int
    each: Pass
    pids: tuple[int, ...] = ()
    warm: bool = True

    def passes(self) -> list[Pass]:
        """In order."""
        return [
            dataclasses.replace(self.each, users=users, repeat=repeat)
            for repeat in range(self.repeats)
            for users in self.levels
        ]


class Watcher:
    """Told of a sweep as it goes; this one looks away."""

    def begins(self, asked: Pass) -> None:
        """A run begins."""

    def answered(self, answer: AnswerRecord) -> None:
        """An answer ended."""

    def ended(self, run: Run) -> None:
        """A run ended, or was found in the store."""


async def sweep(
    client: ChatClient,
    workload: Workload,
    asked: Sweep,
    *,
    store: RunStore | None = None,
    watcher: Watcher | None = None,
) -> list[Run]:
    """All runs, those that a store has included; after one that was stopped there is no other.

    Raises:
        MeasurementError: the server answers no first prompt.
    """
    watcher = watcher or Watcher()
    runs: list[Run] = []
    calibration = None
    is_warm = not asked.warm
    for each in asked.passes():
        found = None if store is None else store.load(each.users, each.repeat)
        if found is None:
            if not is_warm:
                await warm_up(client)
                calibration = await calibrate(client)
                is_warm = True
            watcher.begins(each)
            found = await replay(
                client,
                workload,
                each,
                meter=ProcessMeter(asked.pids) if asked.pids else None,
                calibration=calibration,
                watch=watcher.answered,
            )
            if store is not None:
                store.save(found)
        runs.append(found)
        watcher.ended(found)
        if found.stopped is not None:
            break
    return runs


def digest(workload: Workload) -> str:
    """Of all that is sent and when: equal ones are the same work."""
    return hashlib.sha256(msgspec.json.encode(workload.sessions)).hexdigest()[:16]


def missing(asked: Sweep, runs: Sequence[Run]) -> str | None:
    """Why a sweep is not whole; None if it is."""
    for run in runs:
        if run.stopped is not None:
            left = len(asked.passes()) - len(runs)
            return f"{run.stopped}; {left} more runs were not begun"
    return None
