"""Where ranks of several hosts find each other: torch's TCP store, and bytes from rank to rank.

Each rank leaves its name in the store and waits for all others'. From then on rank 0 and each other
rank send each other bytes over a Gloo group of their own, which tells both sides at once when the
other one's process ends.
"""

import json
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from tokenspeed.core.errors import EngineError
from tokenspeed.distributed.group import LOOPBACK, gloo_group

__all__ = [
    "ByteGroup",
    "Place",
    "RankName",
    "address_towards",
    "leave_failure",
    "meet",
    "tcp_store",
]

_POLL_INTERVAL_S = 0.02
# A message and its length go as one tensor of this many bytes; what is longer follows in a second.
_HEAD_SIZE_BYTES: Final = 8192
_LENGTH: Final = struct.Struct("<Q")
# An idle engine sends nothing, for however long.
_FOREVER: Final = timedelta(days=3650)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankName:
    """A rank, for people and for those that share its host.

    Attributes:
        rank: of all.
        host: its host's name.
        host_id: the same for ranks that share CPUs and memory.
        process: its process id.
        address: where other ranks reach it.
    """

    rank: int
    host: str
    host_id: str
    process: int
    address: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank runs, and where it finds the others.

    Attributes:
        rank: of all.
        local_rank: among those of its host, in the same order.
        local_ranks: how many share the host.
        address: of this host, for other ranks to reach.
        store: where ranks find each other; None for one rank alone.
        device_index: of this rank's GPU, where it has one.
    """

    rank: int = 0
    local_rank: int = 0
    local_ranks: int = 1
    address: str = LOOPBACK
    store: Store | None = None
    device_index: int = 0


def tcp_store(address: str, port: int, *, serve: bool, timeout_s: float, prefix: str) -> Any:
    """torch's store over TCP, and its port.

    Args:
        address: the host that serves it; the one who serves listens on this address alone.
        port: its port; 0 for any that is free, where it is served.
        serve: whether this process serves it.
        timeout_s: how long to try to reach it.
        prefix: keys of one meeting, apart from others in the same store.

    Returns:
        The store, and its port.

    Raises:
        EngineError: nobody serves it there, or it cannot be served.
    """
    listening = None
    try:
        if serve:
            family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family, socket.SOCK_STREAM) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind((address, port))
                server.listen(128)
                port = server.getsockname()[1]
                listening = server.detach()
        store = TCPStore(
            address,
            port,
            is_master=serve,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listening,
        )
    except (OSError, RuntimeError) as error:
        doing = "serve the ranks' meeting point" if serve else "reach rank 0"
        raise EngineError(
            f"cannot {doing} at {address}:{port}: {_first_line(error)}. Check that the address is "
            "rank 0's, and that its port is free and open between the hosts."
        ) from error
    return PrefixStore(prefix, store), port


def address_towards(host: str, port: int) -> str:
    """The address of this host by which it would reach another; nothing is sent.

    Raises:
        EngineError: there is no way to it.
    """
    try:
        family, kind, *_, peer = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(peer)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineError(f"there is no way from this host to {host}: {error}") from error


def meet(
    store: Store,
    rank: int,
    ranks: int,
    *,
    address: str,
    timeout_s: float,
    check: Callable[[], None] = lambda: None,
) -> tuple[Place, tuple[RankName, ...]]:
    """Wait until every rank is there.

    Args:
        store: the same for all.
        rank: this one.
        ranks: how many there are to be.
        address: of this host, for other ranks to reach.
        timeout_s: the longest wait.
        check: called meanwhile; raises what there is no need to wait any longer for.

    Returns:
        This rank's place, and all ranks in their order.

    Raises:
        EngineError: some did not come, or one came and failed; names them.
    """
    own = RankName(
        rank=rank,
        host=socket.gethostname(),
        host_id=f"{socket.gethostname()}/{_boot()}",
        process=os.getpid(),
        address=address,
    )
    store.set(_key(rank), json.dumps(asdict(own)))
    deadline_s = time.monotonic() + timeout_s
    missing = set(range(ranks))
    while missing := {one for one in missing if not store.check([_key(one)])}:
        for one in sorted(missing):
            if store.check([f"{_key(one)}/failure"]):
                raise EngineError(f"rank {one}: {store.get(f'{_key(one)}/failure').decode()}")
        check()
        if time.monotonic() > deadline_s:
            listed = ", ".join(map(str, sorted(missing)))
            raise EngineError(
                f"rank {rank} waited {timeout_s:g} s for {'rank' if len(missing) == 1 else 'ranks'}"
                f" {listed} of {ranks}: start them too, with the same address of rank 0"
            )
        time.sleep(_POLL_INTERVAL_S)
    names = tuple(RankName(**json.loads(store.get(_key(one)))) for one in range(ranks))
    local = [name.rank for name in names if name.host_id == own.host_id]
    place = Place(
        rank=rank,
        local_rank=local.index(rank),
        local_ranks=len(local),
        address=address,
        store=store,
        device_index=local.index(rank),
    )
    return place, names


def leave_failure(store: Store, rank: int, message: str) -> None:
    """Tell those that wait for this rank in `meet` why it will not come."""
    store.set(f"{_key(rank)}/failure", message)


class ByteGroup:
    """Bytes between rank 0 and each other rank.

    Args:
        place: this rank's.
        ranks: how many there are; each of them makes one.
        timeout_s: the longest wait for the others here, and for one to take what is sent.

    Raises:
        EngineError: the others did not come.
    """

    def __init__(self, place: Place, ranks: int, *, timeout_s: float) -> None:
        assert place.store is not None
        self._timeout = timedelta(seconds=timeout_s)
        self._group = gloo_group(
            PrefixStore("bytes", place.store),
            place.rank,
            tuple(range(ranks)),
            address=place.address,
            timeout_s=timeout_s,
        )

    def send(self, rank: int, data: bytes) -> None:
        """Send a message.

        Raises:
            EngineError: the other rank is gone, or takes nothing.
        """
        head = torch.zeros(_HEAD_SIZE_BYTES, dtype=torch.uint8)
        framed = torch.frombuffer(bytearray(_LENGTH.pack(len(data)) + data), dtype=torch.uint8)
        first = framed[:_HEAD_SIZE_BYTES]
        head[: len(first)] = first
        parts = [head, framed[_HEAD_SIZE_BYTES:]]
        try:
            for part in parts if len(parts[1]) else parts[:1]:
                self._group.send([part], rank, 0).wait(self._timeout)
        except RuntimeError as error:
            raise EngineError(f"rank {rank} takes nothing: {_first_line(error)}") from error

    def receive(self, rank: int) -> bytes:
        """The next message of a rank, whenever it comes.

        Raises:
            EngineError: the other rank is gone.
        """
        try:
            head = self._received(rank, _HEAD_SIZE_BYTES)
            (size,) = _LENGTH.unpack_from(head)
            data = head[_LENGTH.size : _LENGTH.size + size]
            return data + (self._received(rank, size - len(data)) if size > len(data) else b"")
        except RuntimeError as error:
            raise EngineError(f"rank {rank} is gone: {_first_line(error)}") from error

    def _received(self, rank: int, size: int) -> bytes:
        part = torch.empty(size, dtype=torch.uint8)
        self._group.recv([part], rank, 0).wait(_FOREVER)
        return part.numpy().tobytes()


def _key(rank: int) -> str:
    return f"rank/{rank}"


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else ""


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
