"""Sessions and clocks for tests that measure a real HTTP server."""

import asyncio
from typing import Self

from tests.support.paced_server import Pace, PacedServer
from tokenspeed.bench.sessions import Message, Session, Turn, Workload


class Steps:
    """A clock that stands still but for `pass_time`, which a server calls between two tokens.

    Time passes only once the client has looked at the clock for what was sent before. So what the
    client measures is the server's schedule, to the last digit, however slow the machine is.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._reads = 0

    def __call__(self) -> float:
        self._reads += 1
        return self.now_s

    async def pass_time(self, seconds: float) -> None:
        before = self._reads
        while self._reads == before:
            await asyncio.sleep(0)
        self.now_s += seconds


class SteppedServer(PacedServer):
    """Runs in the client's own loop, so that neither gets ahead of the other."""

    def __init__(self, pace: Pace, clock: Steps) -> None:
        super().__init__(pace, pause=clock.pass_time)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.main())
        while not self._ready.is_set():
            await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await self._task


def session(name: str, *turns: tuple[str, int], start_s: float | None = None) -> Session:
    """Turns are what is asked and the answer's length."""
    return Session(
        name=name,
        turns=tuple(
            Turn.of((Message(role="user", content=text),), output_tokens=tokens)
            for text, tokens in turns
        ),
        start_s=start_s,
    )


def workload(*sessions: Session) -> Workload:
    return Workload(source="test", sessions=sessions)
