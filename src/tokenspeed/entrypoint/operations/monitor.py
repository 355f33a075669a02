"""Looks at the engine once a second: whether it gets on, and how it did of late."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tokenspeed.core.errors import TokenSpeedError
from tokenspeed.entrypoint.operations.records import RequestBook

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tokenspeed.engine.client import EngineClient
    from tokenspeed.engine.wire import EngineInfo, EngineStats, LiveRequest
    from tokenspeed.entrypoint.servicer import Servicer

__all__ = ["Health", "Monitor", "Sample"]

T = TypeVar("T")

INTERVAL_S = 1.0
_ANSWER_TIMEOUT_S = 2.0
_SAMPLES_MAX = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether the engine gets on.

    Attributes:
        healthy: False when there is no engine, or work is there and no step was run for too long.
        reason: why, for people.
        stalled_s: seconds since it was last seen to get on, or had nothing to do.
    """

    healthy: bool
    reason: str
    stalled_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The engine at one moment of late."""

    at_unix_s: float
    running: int
    waiting: int
    output_tokens_per_s: float
    pages_active: int
    pages_cached: int
    pages_free: int


class Monitor:
    """What the operations port knows of the engine. Lives in the port's thread; the engine's
    client lives in the servicer's loop, and is asked across.

    Args:
        servicer: has the engine's client, when there is one.
        book: the requests.
        loop: the servicer's.
        health_timeout_s: an engine with work that runs no step for so long is unhealthy.
    """

    def __init__(
        self,
        servicer: "Servicer",
        book: RequestBook,
        *,
        loop: asyncio.AbstractEventLoop,
        health_timeout_s: float,
    ) -> None:
        self.health_timeout_s = health_timeout_s
        self.samples: deque[Sample] = deque(maxlen=_SAMPLES_MAX)
        self._servicer = servicer
        self._book = book
        self._loop = loop
        self._stats: EngineStats | None = None
        self._client: EngineClient | None = None
        self._got_on_s = time.monotonic()
        self._asking: asyncio.Task[None] | None = None

    @property
    def info(self) -> "EngineInfo | None":
        """What the engine told of itself; None while there is none."""
        client = self._servicer.client
        return None if client is None else client.info

    async def watch(self) -> None:
        """Look once a second, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL_S)

    async def look(self) -> None:
        """Ask the engine for its counters, and note what they say. Those who ask at once share
        one question."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._look())
        await asyncio.shield(self._asking)

    async def stats(self) -> "EngineStats | None":
        """The engine's counters now, or as they last were where it does not answer; None where it
        never did, or is gone."""
        await self.look()
        return self._stats

    async def live_requests(self) -> "dict[int, LiveRequest]":
        """What the engine tells of its requests, by number; nothing where it does not answer."""
        client = self._servicer.client
        if client is None:
            return {}
        try:
            return {live.request: live for live in await self._ask(client.live_requests())}
        except (TimeoutError, TokenSpeedError):
            return {}

    def health(self) -> Health:
        """Whether the engine gets on, as of the last look."""
        if self._servicer.client is None:
            return Health(healthy=False, reason=self._servicer.absence, stalled_s=0.0)
        stalled_s = max(0.0, time.monotonic() - self._got_on_s)
        if stalled_s > self.health_timeout_s:
            reason = (
                f"work is there, and no step was run for {stalled_s:.0f} s "
                f"(--health-timeout {self.health_timeout_s:g})"
            )
            return Health(healthy=False, reason=reason, stalled_s=stalled_s)
        return Health(healthy=True, reason="the engine gets on", stalled_s=stalled_s)

    async def _look(self) -> None:
        now_s = time.monotonic()
        client = self._servicer.client
        if client is None:
            # A new engine gets its whole time.
            self._stats, self._client, self._got_on_s = None, None, now_s
        else:
            if client is not self._client:
                self._stats, self._client, self._got_on_s = None, client, now_s
            try:
                self._note(await self._ask(client.stats()))
            except (TimeoutError, TokenSpeedError):
                # An engine in a long step answers late. Without requests it is given no step.
                if self._servicer.running == 0:
                    self._got_on_s = now_s
        self._book.settle()

    def _note(self, stats: "EngineStats") -> None:
        before, self._stats = self._stats, stats
        works = stats.running + stats.waiting + stats.parked + stats.transferring > 0
        if not works or before is None or stats.steps != before.steps:
            self._got_on_s = time.monotonic()
        self.samples.append(
            Sample(
                at_unix_s=time.time(),
                running=stats.running,
                waiting=stats.waiting,
                output_tokens_per_s=stats.output_tokens_per_s,
                pages_active=stats.pages_active,
                pages_cached=stats.pages_cached,
                pages_free=stats.pages_free,
            )
        )

    async def _ask(self, question: "Coroutine[Any, Any, T]") -> T:
        """Have the servicer's loop do something, and wait for it, not for long."""
        answer = asyncio.run_coroutine_threadsafe(question, self._loop)
        return await asyncio.wait_for(asyncio.wrap_future(answer), _ANSWER_TIMEOUT_S)
