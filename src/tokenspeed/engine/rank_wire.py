"""Messages between rank 0 and the ranks that follow it, over a socket pair.

A message is its length in eight bytes, and msgpack. Arrays go as their bytes, in the order of the
fields of a plan, whose types both sides know.
"""

import socket
import struct
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Final, get_args, get_type_hints

import msgspec
import numpy as np

from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.errors import EngineError
from tokenspeed.core.step import Int32Array, Int64Array, StepPlan

__all__ = [
    "Failure",
    "FromFollower",
    "Launch",
    "Loaded",
    "Opened",
    "Setup",
    "Stop",
    "ToFollower",
    "decode_plan",
    "encode_plan",
    "receive",
    "send",
]

_LENGTH: Final = struct.Struct("<Q")
_DTYPES: Final = ((Int32Array, np.int32), (Int64Array, np.int64))


class Setup(msgspec.Struct, tag=True):
    """Connect and load: the sizes that rank 0 chose for all."""

    config: SchedulerConfig


class Launch(msgspec.Struct, tag=True):
    """A step: the plan, with the tokens of decode rows in their places."""

    plan: list[Any]


class Stop(msgspec.Struct, tag=True):
    """End."""


class Opened(msgspec.Struct, tag=True):
    """The follower has found the model and waits for its `Setup`."""


class Loaded(msgspec.Struct, tag=True):
    """The follower is ready for steps."""


class Failure(msgspec.Struct, tag=True):
    """The follower cannot go on."""

    kind: str
    message: str


ToFollower = Setup | Launch | Stop
FromFollower = Opened | Loaded | Failure


def send(peer: socket.socket, message: ToFollower | FromFollower) -> None:
    """Send a message; raises OSError where it cannot be sent within the socket's timeout."""
    data = msgspec.msgpack.encode(message)
    peer.sendall(_LENGTH.pack(len(data)) + data)


def receive(peer: socket.socket) -> bytes:
    """The next message.

    Raises:
        EngineError: the other side is gone.
        TimeoutError: none came within the socket's timeout.
    """
    return _exactly(peer, _LENGTH.unpack(_exactly(peer, _LENGTH.size))[0])


def encode_plan(plan: StepPlan) -> list[Any]:
    """A plan as lists of numbers and bytes."""
    return _plain(plan)  # type: ignore[no-any-return]


def decode_plan(data: list[Any]) -> StepPlan:
    """The plan that `encode_plan` was given; its arrays cannot be written."""
    return _made(StepPlan, data)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return [_plain(getattr(value, field.name)) for field in fields(value)]
    return int(value)


def _made(kind: Any, data: Any) -> Any:
    for array, dtype in _DTYPES:
        if kind == array:
            return np.frombuffer(data, dtype=dtype)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return kind(
            **{
                field.name: _made(hints[field.name], item)
                for field, item in zip(fields(kind), data, strict=True)
            }
        )
    if items := get_args(kind):
        return tuple(_made(items[0], item) for item in data)
    return kind(data)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _exactly(peer: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = peer.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise EngineError("the other end of a rank's socket is closed")
        parts += part
    return bytes(parts)
