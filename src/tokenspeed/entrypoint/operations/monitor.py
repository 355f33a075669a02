"""Looks at the engines once a second: whether they get on, and how they did of late."""

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from tokenspeed.core.errors import TokenSpeedError
from tokenspeed.entrypoint.operations.combined import combined_info, combined_stats
from tokenspeed.entrypoint.operations.records import RequestBook

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from tokenspeed.engine.client import EngineClient
    from tokenspeed.engine.facts import EngineInfo, EngineStats, LiveRequest
    from tokenspeed.entrypoint.servicer import Servicer

    Ask: TypeAlias = Callable[[Coroutine[Any, Any, EngineStats]], Coroutine[Any, Any, EngineStats]]

__all__ = ["Health", "Monitor", "Sample"]

T = TypeVar("T")

INTERVAL_S = 1.0
_ANSWER_TIMEOUT_S = 2.0
_SAMPLES_MAX = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether an engine gets on, or all of them do.

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


class _Watched:
    """One engine, as it was last seen.

    Args:
        servicer: has the engine's client, when there is one.
    """

    def __init__(self, servicer: "Servicer") -> None:
        self.servicer = servicer
        self.stats: EngineStats | None = None
        self._client: EngineClient | None = None
        self._got_on_s = time.monotonic()

    @property
    def info(self) -> "EngineInfo | None":
        """What the engine told of itself; None while there is none."""
        client = self.servicer.client
        return None if client is None else client.info

    async def look(self, ask: "Ask") -> None:
        """Ask the engine for its counters, and note what they say."""
        now_s = time.monotonic()
        client = self.servicer.client
        if client is None:
            # A new engine gets its whole time.
            self.stats, self._client, self._got_on_s = None, None, now_s
            return
        if client is not self._client:
            self.stats, self._client, self._got_on_s = None, client, now_s
        try:
            self._note(await ask(client.stats()))
        except (TimeoutError, TokenSpeedError):
            # An engine in a long step answers late. Without requests it is given no step.
            if self.servicer.running == 0:
                self._got_on_s = now_s

    def health(self, timeout_s: float) -> Health:
        """Whether it gets on, as of the last look."""
        if self.servicer.client is None:
            return Health(healthy=False, reason=self.servicer.absence, stalled_s=0.0)
        stalled_s = max(0.0, time.monotonic() - self._got_on_s)
        if stalled_s > timeout_s:
            reason = (
                f"work is there, and no step was run for {stalled_s:.0f} s "
                f"(--health-timeout {timeout_s:g})"
            )
            return Health(healthy=False, reason=reason, stalled_s=stalled_s)
        return Health(healthy=True, reason="the engine gets on", stalled_s=stalled_s)

    def _note(self, stats: "EngineStats") -> None:
        before, self.stats = self.stats, stats
        works = stats.running + stats.waiting + stats.parked + stats.transferring > 0
        if not works or before is None or stats.steps != before.steps:
            self._got_on_s = time.monotonic()


class Monitor:
    """What the operations port knows of the engines. Lives in the port's thread; the engines'
    clients live in the servicers' loop, and are asked across.

    Args:
        servicers: one for each engine.
        book: the requests.
        loop: the servicers'.
        health_timeout_s: an engine with work that runs no step for so long is unhealthy.
    """

    def __init__(
        self,
        servicers: "Sequence[Servicer]",
        book: RequestBook,
        *,
        loop: asyncio.AbstractEventLoop,
        health_timeout_s: float,
    ) -> None:
        self.health_timeout_s = health_timeout_s
        self.samples: deque[Sample] = deque(maxlen=_SAMPLES_MAX)
        self._engines = [_Watched(servicer) for servicer in servicers]
        self._book = book
        self._loop = loop
        self._asking: asyncio.Task[None] | None = None

    @property
    def info(self) -> "EngineInfo | None":
        """What the engines told of themselves, together; None while there is none."""
        return combined_info([info for engine in self._engines if (info := engine.info)])

    async def watch(self) -> None:
        """Look once a second, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL_S)

    async def look(self) -> None:
        """Ask the engines for their counters, and note what they say. Those who ask at once share
        one question."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._look())
        await asyncio.shield(self._asking)

    async def stats(self) -> "EngineStats | None":
        """The engines' counters now, together, or as they last were where one does not answer;
        None where none ever did, or all are gone."""
        await self.look()
        return self._stats()

    async def live_requests(self) -> "dict[int, LiveRequest]":
        """What the engines tell of their requests, by number; nothing where one does not answer."""
        found: dict[int, LiveRequest] = {}
        for engine in self._engines:
            client = engine.servicer.client
            if client is None:
                continue
            with contextlib.suppress(TimeoutError, TokenSpeedError):
                for live in await self._ask(client.live_requests()):
                    found[live.request] = live
        return found

    def health(self) -> Health:
        """Whether all engines get on, as of the last look; else of the first that does not."""
        found = [engine.health(self.health_timeout_s) for engine in self._engines]
        for number, health in enumerate(found):
            if not health.healthy:
                several = f"engine {number} of {len(found)}: " if len(found) > 1 else ""
                return replace(health, reason=several + health.reason)
        return max(found, key=lambda health: health.stalled_s)

    @property
    def able(self) -> bool:
        """Whether an engine gets on, so that a request would be taken."""
        return any(engine.health(self.health_timeout_s).healthy for engine in self._engines)

    async def _look(self) -> None:
        await asyncio.gather(*(engine.look(self._ask) for engine in self._engines))
        if (stats := self._stats()) is not None:
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
        self._book.settle()

    def _stats(self) -> "EngineStats | None":
        return combined_stats([stats for engine in self._engines if (stats := engine.stats)])

    async def _ask(self, question: "Coroutine[Any, Any, T]") -> T:
        """Have the servicers' loop do something, and wait for it, not for long."""
        answer = asyncio.run_coroutine_threadsafe(question, self._loop)
        return await asyncio.wait_for(asyncio.wrap_future(answer), _ANSWER_TIMEOUT_S)
