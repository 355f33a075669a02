"""Tells an engine that hangs from one that is deep in a long step. Imports no torch."""

import asyncio
import contextlib
import os
from pathlib import Path

from tokenspeed.core.errors import EngineDead
from tokenspeed.engine.client import EngineClient

__all__ = ["Pulse", "Silence", "cpu_time_s", "descendants", "wants_to_run"]

TICK_S = 0.5
# A process that was itself held (a suspended machine, a debugger) saw no silence meanwhile.
TICK_MAX_S = 2 * TICK_S
# Silent and at rest: stopped, or waiting for what does not come. Ranks that wait for each other
# give up and say whom they waited for in less than this.
REST_MAX_S = 8.5
# Silent and at work: the longest step of a small machine is far below this.
WORK_MAX_S = 120.0
# A stopped engine uses no CPU at all; one whose network thread alone lives, hardly any.
_WORK_SHARE_MIN = 0.02


class Silence:
    """How long an engine has said nothing, and whether it works meanwhile."""

    def __init__(self) -> None:
        self._silent_s = 0.0
        self._worked_s = 0.0

    def broken(self) -> None:
        """It said something."""
        self._silent_s = 0.0
        self._worked_s = 0.0

    def lasts(self, elapsed_s: float, worked_s: float | None) -> str | None:
        """It went on being silent; why the engine is to be given up, or None.

        Args:
            elapsed_s: time since the last call.
            worked_s: CPU time it took meanwhile, or all where it waited for a CPU or a disk; None
                where nobody knows.
        """
        self._silent_s += min(elapsed_s, TICK_MAX_S)
        self._worked_s += elapsed_s if worked_s is None else worked_s
        works = self._worked_s >= _WORK_SHARE_MIN * self._silent_s
        if self._silent_s < (WORK_MAX_S if works else REST_MAX_S):
            return None
        doing = "and seems to work on something endless" if works else "and does nothing"
        return f"it has said nothing for {self._silent_s:.0f} s {doing}"


class Pulse:
    """Asks an engine for its counters, over and over.

    Args:
        client: of the engine.
        pid: of its process.
    """

    def __init__(self, client: EngineClient, pid: int) -> None:
        self._client = client
        self._pid = pid

    async def lost(self) -> str:
        """Return once the engine hangs, with the reason for people.

        Raises:
            EngineDead: it ended instead.
        """
        loop = asyncio.get_running_loop()
        silence = Silence()
        asked: asyncio.Task[object] | None = None
        heard = self._client.messages
        at_s, cpu_s = loop.time(), cpu_time_s(self._pid)
        try:
            while self._client.alive:
                await asyncio.sleep(TICK_S)
                before_s, at_s = at_s, loop.time()
                cpu_before_s, cpu_s = cpu_s, cpu_time_s(self._pid)
                if asked is not None and asked.done():
                    asked.result()
                    asked = None
                if self._client.messages != heard:
                    heard = self._client.messages
                    silence.broken()
                    continue
                if asked is None:
                    # Busy engines are heard of anyway; one that says nothing is asked.
                    asked = asyncio.create_task(self._client.stats())
                elapsed_s = at_s - before_s
                worked_s = None
                if cpu_s is not None and cpu_before_s is not None:
                    wants = wants_to_run(self._pid)
                    worked_s = elapsed_s if wants else cpu_s - cpu_before_s
                if (reason := silence.lasts(elapsed_s, worked_s)) is not None:
                    return reason
        finally:
            if asked is not None:
                asked.cancel()
        raise EngineDead("the engine ended")


def cpu_time_s(pid: int) -> float | None:
    """CPU time of all threads of a process; None where it is not to be known (no Linux, gone)."""
    fields = _stat(pid)
    if fields is None:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wants_to_run(pid: int) -> bool:
    """Whether a process waits for a CPU or for a disk: a busy machine's delay, not its own."""
    fields = _stat(pid)
    return fields is not None and fields[0] in ("R", "D")


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they did (Linux)."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(child) for child in (task / "children").read_text().split()]
    return found + [below for child in found for below in descendants(child)]


def _stat(pid: int) -> list[str] | None:
    """What /proc says of a process, from its state on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name before may hold anything, closing brackets too.
    return text.rpartition(")")[2].split()
