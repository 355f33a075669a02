"""The common ticks of the clock at which streams write.

A message costs servicer and gateway together some 60 to 100 µs of CPU, whatever it holds. Few
streams get each token as it comes; with many, tokens share messages, so that streaming takes one or
two hundredths of a core from the model and not a tenth.
"""

import asyncio
from typing import Protocol

from tokenspeed.core.config import STREAM_INTERVAL_MS
from tokenspeed.engine.outbox import tick_s

__all__ = ["WriteTicks"]

# Whoever reads along is ever further behind a text that comes faster than people read, and an agent
# acts on whole answers: no token waits for longer than this part of the time that its answer has
# been coming, or for the next tick.
_AGE_SHARE = 0.4
# Every tick, every second, every fourth: longer waits end at ticks at which others write as well.
_TICKS_MAX = 4
# The event loop's clock counts whole milliseconds.
_CLOCK_STEP_S = 0.001


class Resting(Protocol):
    """A stream whose tokens gather."""

    @property
    def first_token_s(self) -> float | None:
        """When the first token came, by the event loop's clock."""

    async def rest(self) -> None:
        """Wait until woken, or until the stream ends."""

    def end_rest(self) -> None:
        """Wake who rests, if anybody does."""


class WriteTicks:
    """Wakes all streams that rest until the same time together.

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
        self._resting: list[tuple[float, Resting]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def tick_s(self) -> float:
        """The time between two ticks; 0 where streams do not wait."""
        return tick_s(self.streams, self._interval_max_s)

    def next_s(self, now_s: float, age_s: float) -> float:
        """When a stream writes next, by the clock that says it is `now_s`.

        Args:
            now_s: the time.
            age_s: how long ago the stream's first token came.
        """
        tick = self.tick_s()
        if tick == 0.0:
            return now_s
        ticks = _TICKS_MAX
        while ticks > 1 and ticks * tick > _AGE_SHARE * age_s:
            ticks //= 2
        interval_s = ticks * tick
        return now_s + interval_s - now_s % interval_s

    async def rest(self, stream: Resting) -> None:
        """Let a stream's tokens gather until it writes next, or until it ends."""
        if self.tick_s() == 0.0:
            return
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        first_s = stream.first_token_s
        due_s = self.next_s(now_s, 0.0 if first_s is None else now_s - first_s)
        self._resting.append((due_s, stream))
        if self._timer is None or due_s < self._timer_s:
            self._set(due_s)
        await stream.rest()

    def _set(self, due_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due_s, self._wake)
        self._timer_s = due_s

    def _wake(self) -> None:
        self._timer = None
        now_s = asyncio.get_running_loop().time() + _CLOCK_STEP_S
        due = [stream for due_s, stream in self._resting if due_s <= now_s]
        self._resting = [entry for entry in self._resting if entry[0] > now_s]
        for stream in due:
            stream.end_rest()
        if self._resting:
            self._set(min(due_s for due_s, _ in self._resting))
