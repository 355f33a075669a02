"""Which processes are the ranks of an engine, and the way from rank 0 to each of them.

Ranks of one host are started here; torchrun and Ray start theirs over many.
"""

import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import Torchrun, torchrun
from tokenspeed.core.errors import ConfigError
from tokenspeed.core.records import json_text
from tokenspeed.distributed import (
    ByteGroup,
    Mesh,
    Place,
    RankName,
    address_towards,
    file_store,
    meet,
    tcp_store,
)
from tokenspeed.engine.crowd import check_crowd
from tokenspeed.engine.rank_links import GroupLink, Link, SocketLink

__all__ = [
    "LINK_TIMEOUT_S",
    "MEETING_TIMEOUT_S",
    "LaunchedRanks",
    "Member",
    "RemoteMember",
    "byte_links",
    "check_ranks",
    "check_torchrun",
    "executor_backend",
    "launch_ranks",
    "meeting_prefix",
]

# Ranks come within the time that imports take, or not at all.
MEETING_TIMEOUT_S = 120.0
LINK_TIMEOUT_S = 8.0


class Member(Protocol):
    """A rank above 0, as rank 0 sees it.

    Attributes:
        rank: which.
        name: for people.
        link: the way to it.
    """

    rank: int
    name: str
    link: Link

    def ended(self, wait_s: float = 0.0) -> str | None:
        """How its process ended; None while it lives, or where nobody knows."""

    def end(self) -> None:
        """Kill it if it still runs, as far as that is rank 0's to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedRanks:
    """The other ranks of an engine.

    Attributes:
        members: ranks above 0, in order.
        place: of rank 0.
        release: frees what was taken for them, once they have ended.
    """

    members: Sequence[Member]
    place: Place
    release: Callable[[], None]


def executor_backend(config: EngineConfig) -> str:
    """Who starts the ranks: "mp", "torchrun" or "ray".

    Raises:
        ConfigError: torchrun is asked for, and did not start this process.
    """
    wanted = config.distributed_executor_backend
    found = torchrun()
    if wanted == "torchrun" and found is None:
        raise ConfigError(
            "--distributed-executor-backend torchrun needs RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT: start it by torchrun, or leave the flag out"
        )
    if wanted is not None:
        return wanted
    return "torchrun" if found is not None and found.world_size > 1 else "mp"


def check_ranks(config: EngineConfig, mesh: Mesh) -> None:
    """Raises ConfigError where torchrun started more or fewer ranks than the mesh has, or where
    this host would get far too many."""
    found = torchrun()
    backend = executor_backend(config)
    if backend == "torchrun" and found is not None:
        check_torchrun(found, mesh)
    if backend == "mp":
        check_crowd(config, ranks=mesh.world)


def check_torchrun(found: Torchrun, mesh: Mesh) -> None:
    """Raises ConfigError where torchrun started more or fewer ranks than the mesh has."""
    if found.world_size != mesh.world:
        raise ConfigError(
            f"torchrun started {found.world_size} ranks (WORLD_SIZE), but {mesh.flags} makes "
            f"{mesh.world}: give --tp {found.world_size}, or start {mesh.world} with "
            "--nproc-per-node and --nnodes"
        )


def launch_ranks(config: EngineConfig, mesh: Mesh) -> LaunchedRanks:
    """Start the ranks above 0, or meet those that were started.

    Raises:
        ConfigError: there are not as many ranks as the mesh has, or no room for them.
        EngineError: some did not come.
    """
    backend = executor_backend(config)
    if backend == "ray":
        # Ray need not be installed.
        from tokenspeed.engine.rank_ray import launch_with_ray  # noqa: PLC0415

        return launch_with_ray(config, mesh)
    if backend == "torchrun":
        return _met_by_torchrun(mesh)
    return _started_here(config, mesh)


class RemoteMember:
    """A rank that something else started, and will end.

    Args:
        name: which.
        link: the way to it.
    """

    def __init__(self, name: RankName, link: Link) -> None:
        self.rank = name.rank
        self.name = str(name)
        self.link = link

    def ended(self, wait_s: float = 0.0) -> str | None:
        """Nobody knows."""
        return None

    def end(self) -> None:
        """Whoever started it will; it ends itself once rank 0 is gone."""


def byte_links(place: Place, names: Sequence[RankName]) -> list[GroupLink]:
    """Rank 0's ways to the others, in their order."""
    group = ByteGroup(place, len(names), timeout_s=LINK_TIMEOUT_S)
    return [GroupLink(group, name.rank) for name in names[1:]]


def meeting_prefix(restarts: int = 0) -> str:
    """Under which the ranks of an engine meet; torchrun's store outlives those that it started."""
    return f"tokenspeed/{restarts}"


def _met_by_torchrun(mesh: Mesh) -> LaunchedRanks:
    found = torchrun()
    assert found is not None
    if found.rank != 0:
        raise ConfigError(
            f"this is rank {found.rank} (RANK), and engines are built by rank 0: the others "
            "follow it by `tokenspeed serve`"
        )
    store, _ = tcp_store(
        found.master_address,
        found.master_port,
        serve=not found.serves_store,
        timeout_s=MEETING_TIMEOUT_S,
        prefix=meeting_prefix(found.restarts),
    )
    address = address_towards(found.master_address, found.master_port)
    place, names = meet(store, 0, mesh.world, address=address, timeout_s=MEETING_TIMEOUT_S)
    links = byte_links(place, names)
    return LaunchedRanks(
        members=[RemoteMember(*pair) for pair in zip(names[1:], links, strict=True)],
        place=place,
        release=lambda: None,
    )


class _Child:
    """A rank that is a process of this one."""

    def __init__(self, rank: int, config: EngineConfig, store: Path) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tokenspeed.engine.follower",
                    *("--rank", str(rank)),
                    *("--socket-fd", str(theirs.fileno())),
                    *("--store", str(store)),
                    *("--config-json", json_text(config)),
                ],
                pass_fds=[theirs.fileno()],
            )
        self.name = f"rank {rank} (process {self.process.pid})"
        self.link: Link = SocketLink(ours)

    def ended(self, wait_s: float = 0.0) -> str | None:
        """How the process ended; None while it lives."""
        try:
            code = self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _started_here(config: EngineConfig, mesh: Mesh) -> LaunchedRanks:
    folder = tempfile.TemporaryDirectory(prefix="tokenspeed-ranks-")
    path = Path(folder.name) / "store"
    return LaunchedRanks(
        members=[_Child(rank, config, path) for rank in range(1, mesh.world)],
        place=Place(local_ranks=mesh.world, store=file_store(path, mesh.world)),
        release=folder.cleanup,
    )
