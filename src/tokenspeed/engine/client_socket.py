"""The client's end of the socket, watched by the event loop itself."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import zmq

from tokenspeed.engine.wire import endpoint

__all__ = ["ClientSocket"]


class ClientSocket:
    """A ZeroMQ pair that gives each message to a handler, on the running event loop.

    pyzmq's own asyncio socket makes several futures and system calls a message, which showed as
    a third of the servicer's time.

    Args:
        socket_path: Unix-domain socket of the engine; it need not exist yet.
    """

    def __init__(self, socket_path: Path) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        # No limit: what is queued is bounded by the requests that run.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint(socket_path))
        self._handler: Callable[[bytes], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._drain)

    def listen(self, handler: Callable[[bytes], None]) -> None:
        """Give messages to this handler from now on."""
        self._handler = handler
        self._loop.call_soon(self._drain)

    def send(self, data: bytes) -> None:
        """Send a message; it waits in the queue while the engine is not there."""
        self._socket.send(data, zmq.NOBLOCK)
        # The descriptor tells of changes only, and sending may have taken note of one.
        self._loop.call_soon(self._drain)

    def close(self) -> None:
        """Close the socket; messages still queued are dropped."""
        self._loop.remove_reader(self._descriptor)
        self._handler = None
        self._socket.close()
        self._context.term()

    def _drain(self) -> None:
        while self._handler is not None:
            # Asked first: to be told by an exception that nothing is left costs more.
            if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            self._handler(self._socket.recv(zmq.NOBLOCK))
