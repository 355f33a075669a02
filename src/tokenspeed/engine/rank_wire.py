"""Messages between rank 0 and the ranks that follow it.

A message is msgpack. Arrays go as their bytes, in the order of the fields of a plan, whose types
both sides know.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Final, get_args, get_type_hints

import numpy as np

from tokenspeed.core.config import EngineConfig, SchedulerConfig
from tokenspeed.core.records import Record, decoder, encode
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
    "decode_from_follower",
    "decode_plan",
    "decode_to_follower",
    "encode",
    "encode_plan",
]

_DTYPES: Final = ((Int32Array, np.int32), (Int64Array, np.int64))


class Setup(Record, tag=True):
    """Connect and load: the sizes that rank 0 chose for all."""

    config: SchedulerConfig


class Launch(Record, tag=True):
    """A step: the plan, with the tokens of decode rows in their places."""

    plan: list[Any]


class Stop(Record, tag=True):
    """End."""


class Opened(Record, tag=True, kw_only=True):
    """The follower has found the model and waits for its `Setup`.

    Attributes:
        config: what it was started with.
        model: the fingerprint of the model's files.
        dtype: what "auto" came to on its host.
        memory_size_bytes: what it may take of its host's memory.
    """

    config: EngineConfig
    model: str
    dtype: str
    memory_size_bytes: int


class Loaded(Record, tag=True):
    """The follower is ready for steps."""


class Failure(Record, tag=True):
    """The follower cannot go on."""

    kind: str
    message: str


ToFollower = Setup | Launch | Stop
FromFollower = Opened | Loaded | Failure


def decode_to_follower(data: bytes) -> ToFollower:
    """What rank 0 sent."""
    message: ToFollower = _to_follower()(data)
    return message


def decode_from_follower(data: bytes) -> FromFollower:
    """What a rank that follows sent."""
    message: FromFollower = _from_follower()(data)
    return message


@cache
def _to_follower() -> Callable[[bytes], Any]:
    return decoder(ToFollower)


@cache
def _from_follower() -> Callable[[bytes], Any]:
    return decoder(FromFollower)


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
