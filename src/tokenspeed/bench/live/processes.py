"""Finds the processes of a server and sums what they take; needs psutil, the extra `bench`."""

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from tokenspeed.bench.live.records import ProcessUsage
from tokenspeed.core.errors import ConfigError

if TYPE_CHECKING:
    import psutil

__all__ = ["ProcessMeter", "find_server"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def find_server(url: str) -> int | None:
    """The process at the head of the server that listens at a loopback URL; None if unknown.

    It is the one that listens, or whatever started it, as a supervisor starts its gateway: in its
    own process group, or in a session made for the child.
    """
    if importlib.util.find_spec("psutil") is None:
        return None
    import psutil  # noqa: PLC0415

    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if parts.hostname not in _LOOPBACK:
        return None
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return None
    listening = [
        entry.pid
        for entry in connections
        if entry.status == psutil.CONN_LISTEN and entry.laddr.port == port and entry.pid
    ]
    if not listening:
        return None
    found = psutil.Process(listening[0])
    # A script may have started both the server and us: it is no part of the server.
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    with contextlib.suppress(psutil.Error, OSError):
        for parent in found.parents():
            joined = os.getpgid(parent.pid) == os.getpgid(found.pid)
            set_apart = os.getsid(found.pid) == found.pid
            same_user = parent.uids().real == found.uids().real
            if parent.pid in (1, *ours) or not same_user or not (joined or set_apart):
                break
            found = parent
    pid: int = found.pid
    return pid


class ProcessMeter:
    """Sums CPU time and memory of processes and all below them, from when the block is entered.

    Call `sample` now and then: memory's peak and the time of processes that end are only known as
    far as samples show them.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        """Raises ConfigError where psutil is missing or a process is not there."""
        if importlib.util.find_spec("psutil") is None:
            raise ConfigError(
                "--pid needs psutil; install it with `pip install 'tokenspeed[bench]'`"
            )
        import psutil  # noqa: PLC0415

        self._psutil = psutil
        self._roots = []
        for pid in pids:
            try:
                self._roots.append(psutil.Process(pid))
            except psutil.Error as error:
                raise ConfigError(f"--pid {pid}: no such process") from error
        self._before: dict[int, float] = {}
        self._latest: dict[int, float] = {}
        self._rss_max = 0

    def __enter__(self) -> Self:
        self._before = {process.pid: _cpu_s(process) for process in self._family()}
        self.sample()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sample()

    def sample(self) -> None:
        """Look at the processes as they are now."""
        rss = 0
        for process in self._family():
            with contextlib.suppress(self._psutil.Error):
                self._latest[process.pid] = _cpu_s(process)
                rss += process.memory_info().rss
        self._rss_max = max(self._rss_max, rss)

    def usage(self) -> ProcessUsage:
        """Until the last sample. A process that began since counts from its beginning."""
        return ProcessUsage(
            pids=tuple(sorted(self._latest)),
            cpu_s=sum(
                spent_s - self._before.get(pid, 0.0) for pid, spent_s in self._latest.items()
            ),
            rss_max_bytes=self._rss_max,
        )

    def _family(self) -> "list[psutil.Process]":
        found: dict[int, psutil.Process] = {}
        for root in self._roots:
            with contextlib.suppress(self._psutil.Error):
                for process in (root, *root.children(recursive=True)):
                    found.setdefault(process.pid, process)
        return list(found.values())


def _cpu_s(process: "psutil.Process") -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
