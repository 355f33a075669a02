"""What an engine's steps gave, on its way to the client: kept for a moment, so that steps share."""

import time
from collections.abc import Callable, Sequence

from tokenspeed.engine.wire import CacheEventBatch, FromEngine, Refused, StepOutputs, Submit

__all__ = ["Outbox", "tick_s"]

# So many streams, and more, wait for the whole interval; fewer wait for so much less.
_STREAMS_OF_A_WHOLE_INTERVAL = 20
# The shortest ticks are this part of the longest time that a token waits.
_TICKS_OF_AN_INTERVAL = 4
# Below this a timer costs more than it saves.
_TICK_MIN_S = 0.004
# What is sent this long before a tick has come when the tick is there.
_TRANSIT_S = 0.002


def tick_s(streams: int, interval_max_s: float) -> float:
    """Seconds between the ticks of the clock at which streams write; 0 where they do not wait.

    Args:
        streams: how many there are.
        interval_max_s: the longest time for which a token may wait.
    """
    share = min(streams / _STREAMS_OF_A_WHOLE_INTERVAL, 1.0)
    interval_s = share * interval_max_s / _TICKS_OF_AN_INTERVAL
    return interval_s if interval_s > _TICK_MIN_S else 0.0


class Outbox:
    """Sends an engine's messages, those of plain decoding steps some at a time.

    A message wakes two threads of the client, which costs more than the tokens in it; and where
    many streams run, the client lets tokens wait for the next tick anyway. So the outputs of a step
    are kept until the last step before the tick, if the client can do nothing with them earlier:
    every live request got tokens, as in the step before, and none came, ended, or waits for a
    string to stop at. A request that comes, and anything else that is sent, takes along what was
    kept: no long step begins with tokens in the box.

    Args:
        send: sends messages, so that they arrive as one.
        interval_max_s: as of `tick_s`; 0 to keep nothing.
        clock: seconds of the clock that the client's ticks go by.
    """

    def __init__(
        self,
        send: Callable[[Sequence[FromEngine]], None],
        *,
        interval_max_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._interval_max_s = interval_max_s
        self._clock = clock
        self._kept: list[FromEngine] = []
        self._deadline_s = 0.0
        self._stepped_s = 0.0
        self._requests: set[int] = set()
        # Those whose text the client watches for strings to stop at.
        self._watched: set[int] = set()

    def submitted(self, message: Submit) -> None:
        """A request came."""
        self.flush()
        if message.params.stop:
            self._watched.add(message.request)

    def put(self, message: FromEngine) -> None:
        """Send a message, behind what was kept."""
        if isinstance(message, Refused):
            self._watched.discard(message.request)
        self._kept.append(message)
        self.flush()

    def step(self, outputs: StepOutputs, *, live: int) -> None:
        """Send what a step gave, now or soon.

        Args:
            outputs: of the step.
            live: requests that have not ended, those that wait for their turn among them.
        """
        now_s = self._clock()
        took_s, self._stepped_s = now_s - self._stepped_s, now_s
        requests = set(memoryview(outputs.requests).cast("q"))
        if outputs.finished:
            self._watched.difference_update(memoryview(outputs.finished).cast("q"))
        plain = (
            requests == self._requests
            and len(requests) == live
            and not (outputs.finished or outputs.admitted or self._watched)
        )
        self._requests = requests
        interval_s = tick_s(live, self._interval_max_s) if plain else 0.0
        if interval_s == 0.0:
            self.put(outputs)
            return
        if not self._kept:
            self._deadline_s = now_s + interval_s - now_s % interval_s
        self._kept.append(outputs)
        if now_s + took_s + _TRANSIT_S >= self._deadline_s:
            self.flush()

    def cache_events(self, batch: CacheEventBatch) -> None:
        """Send changes of the cache, together with the outputs of the step that made them."""
        if self._kept:
            self._kept.append(batch)
        else:
            self.put(batch)

    def flush(self) -> None:
        """Send what was kept."""
        if self._kept:
            self._send(self._kept)
            self._kept = []
