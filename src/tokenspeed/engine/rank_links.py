"""Ways for bytes between rank 0 and a rank that follows it: a socket pair on one host, and a group
of torch.distributed between hosts."""

import contextlib
import queue
import socket
import struct
import threading
from typing import Final, Protocol

from tokenspeed.core.errors import EngineError
from tokenspeed.distributed import ByteGroup

__all__ = ["SEND_TIMEOUT_S", "GroupLink", "Link", "Listener", "SocketLink"]

SEND_TIMEOUT_S: Final = 6.0
_LENGTH: Final = struct.Struct("<Q")
_TIMEVAL: Final = struct.Struct("@ll")


class Link(Protocol):
    """The way between rank 0 and one other rank, seen from either."""

    def send(self, data: bytes) -> None:
        """Send a message; raises EngineError where it is not taken within some seconds."""

    def receive(self) -> bytes:
        """The next message, whenever it comes; raises EngineError once the other side is gone."""

    def close(self) -> None:
        """End it; the other side notices."""


class SocketLink:
    """A message is its length in eight bytes, and its bytes.

    Args:
        peer: one end of a socket pair.
    """

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        # A timeout of Python's own would hold for receiving too, which another thread may do.
        peer.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(SEND_TIMEOUT_S), 0)
        )

    def send(self, data: bytes) -> None:
        """Send a message."""
        try:
            self._peer.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise EngineError(f"the other end of a rank's socket takes nothing: {error}") from error

    def receive(self) -> bytes:
        """The next message."""
        return self._exactly(_LENGTH.unpack(self._exactly(_LENGTH.size))[0])

    def close(self) -> None:
        """Close this end."""
        with contextlib.suppress(OSError):
            # A thread that reads is woken by this, and not by closing alone.
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._peer.recv(min(count - len(parts), 1 << 20))
            except OSError as error:
                raise EngineError(f"a rank's socket failed: {error}") from error
            if not part:
                raise EngineError("the other end of a rank's socket is closed")
            parts += part
        return bytes(parts)


class GroupLink:
    """Bytes to one member of a group.

    Args:
        group: of all ranks.
        rank: the other one.
    """

    def __init__(self, group: ByteGroup, rank: int) -> None:
        self._group = group
        self._rank = rank

    def send(self, data: bytes) -> None:
        """Send a message."""
        self._group.send(self._rank, data)

    def receive(self) -> bytes:
        """The next message."""
        return self._group.receive(self._rank)

    def close(self) -> None:
        """Nothing: it ends with the process."""


class Listener:
    """Takes what a rank says, on a thread of its own, until it is gone.

    Args:
        link: the way to it.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # Daemons: nothing ends a thread that waits for a message of torch's group.
        self._thread = threading.Thread(target=self._run, name="rank-listener", daemon=True)
        self._thread.start()

    @property
    def silent(self) -> bool:
        """Whether there is nothing to take, the rank's end included."""
        return self._messages.empty()

    def next(self, timeout_s: float | None) -> bytes | None:
        """The next message; None once the rank is gone.

        Args:
            timeout_s: the longest wait; None to wait for as long as it takes.

        Raises:
            TimeoutError: it says nothing.
        """
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"nothing in {timeout_s} s") from None
        if message is None:
            # Whoever asks again is to be told again.
            self._messages.put(None)
        return message

    def _run(self) -> None:
        try:
            while True:
                self._messages.put(self._link.receive())
        except EngineError:
            self._messages.put(None)
