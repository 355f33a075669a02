"""The common ticks of the clock at which streams write."""

import asyncio
from typing import Protocol

__all__ = ["STREAM_INTERVAL_MS", "WriteTicks"]

# A message costs servicer and gateway together some 60 to 100 µs of CPU, whatever it holds. Few
# streams get each token as it comes; with many, tokens share messages, so that streaming takes one
# or two hundredths of a core from the model and not a tenth.
STREAM_INTERVAL_MS = 100
# So many streams, and more, wait for the whole interval; fewer wait for so much less.
_STREAMS_OF_A_WHOLE_INTERVAL = 20
# Below this a timer costs more than it saves.
_INTERVAL_MIN_S = 0.004


class Resting(Protocol):
    """A stream whose tokens gather."""

    async def rest(self) -> None:
        """Wait until woken, or until the stream ends."""

    def end_rest(self) -> None:
        """Wake who rests, if anybody does."""


class WriteTicks:
    """Wakes all streams that rest at one time.

    Messages that are written together share system calls and wake-ups on both sides, which cost
    more than the messages; and one timer serves all streams.

    Args:
        interval_max_s: the longest time that a token waits for others of its stream.

    Attributes:
        streams: how many there are.
    """

    def __init__(self, interval_max_s: float = STREAM_INTERVAL_MS / 1000) -> None:
        self.streams = 0
        self._interval_max_s = interval_max_s
        self._resting: list[Resting] = []
        self._timer: asyncio.TimerHandle | None = None

    def interval_s(self) -> float:
        """The time between two ticks; 0 where streams do not wait."""
        share = min(self.streams / _STREAMS_OF_A_WHOLE_INTERVAL, 1.0)
        interval_s = share * self._interval_max_s
        return interval_s if interval_s > _INTERVAL_MIN_S else 0.0

    def next_s(self, now_s: float) -> float:
        """When the next tick is, by the clock that says it is `now_s`."""
        interval_s = self.interval_s()
        return now_s if interval_s == 0.0 else now_s + interval_s - now_s % interval_s

    async def rest(self, stream: Resting) -> None:
        """Let a stream's tokens gather until the next tick, or until the stream ends."""
        if self.interval_s() == 0.0:
            return
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self.next_s(loop.time()), self._wake)
        self._resting.append(stream)
        await stream.rest()

    def _wake(self) -> None:
        self._timer = None
        resting, self._resting = self._resting, []
        for stream in resting:
            stream.end_rest()
