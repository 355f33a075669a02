"""Sizes that were measured to be fast, by device, op and shape, and measuring them.

A kernel asks for its sizes with what it takes where nothing was measured. Tuning runs a workload,
sees what its kernels ask for, and tries each candidate in place of each answer, one after the
other, keeping what was faster (coordinate descent). What it finds is a JSON file,
`tuned.json` in the cache directory: {device: {op: {bucket: {name: value}}}}.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch

from tokenspeed.core.environment import cache_dir
from tokenspeed.core.errors import ConfigError

__all__ = [
    "CANDIDATES",
    "Found",
    "Sizes",
    "read_table",
    "tune",
    "tuned",
    "tuned_path",
    "write_table",
]

Sizes = Mapping[str, int]
_Key = tuple[str, str]
_Table = dict[str, dict[str, dict[str, dict[str, int]]]]

# Less is noise.
_GAIN_MIN = 0.02

CANDIDATES: Final[Mapping[str, Sequence[int]]] = MappingProxyType(
    {
        "block": (16, 32, 64, 128),
        "warps": (2, 4, 8),
        "stages": (1, 2, 3, 4),
        "outputs": (32, 64, 128),
    }
)
"""Values tried for each name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What tuning came to for one question of a kernel.

    Attributes:
        op, bucket: the question.
        sizes: the answer.
        before_us, after_us: of the workload, with what was taken before and with the answer.
    """

    op: str
    bucket: str
    sizes: Sizes
    before_us: float
    after_us: float


@dataclass(slots=True)
class _Trial:
    """Answers in place of the table's, and the questions asked."""

    answers: dict[_Key, Sizes]
    asked: dict[_Key, Sizes] = field(default_factory=dict)


_trial: ContextVar[_Trial | None] = ContextVar("trial", default=None)


def tuned(op: str, bucket: str, device: torch.device, **sizes: int) -> dict[str, int]:
    """A kernel's sizes on a device: those measured, or else those given.

    Args:
        op: whose.
        bucket: the shapes they are for, in words.
        device: where it runs.
        sizes: what is taken where nothing was measured, by names of `CANDIDATES`.
    """
    trial = _trial.get()
    if trial is not None:
        trial.asked.setdefault((op, bucket), sizes)
        return {**sizes, **trial.answers.get((op, bucket), {})}
    if device.type != "cuda":
        return sizes
    return {**sizes, **_measured(torch.cuda.get_device_name(device)).get((op, bucket), {})}


def tune(
    calls: Sequence[Callable[[], object]],
    time_us: Callable[[Sequence[Callable[[], object]]], float],
) -> list[Found]:
    """Find sizes for everything that some calls' kernels ask for.

    A candidate that does not compile, or takes more than the device has, is passed over.

    Args:
        calls: alike; they must make anew what their kernels keep with a step.
        time_us: measures them.
    """
    with _trying({}) as trial:
        calls[0]()
    answers: dict[_Key, Sizes] = {}
    found = []
    for key, sizes in trial.asked.items():
        best = before_us = _timed(calls, answers, time_us)
        for name in sizes:
            for value in CANDIDATES[name]:
                tried = {**sizes, **answers.get(key, {}), name: value}
                try:
                    took_us = _timed(calls, {**answers, key: tried}, time_us)
                # The compiler refuses what does not fit in many ways.
                except Exception:  # noqa: S112
                    continue
                if took_us < best * (1 - _GAIN_MIN):
                    best, answers[key] = took_us, tried
        if key in answers:
            op, bucket = key
            found.append(
                Found(op=op, bucket=bucket, sizes=answers[key], before_us=before_us, after_us=best)
            )
    return found


def tuned_path() -> Path:
    """Where this machine's table is."""
    return cache_dir() / "tuned.json"


def read_table(path: Path) -> _Table:
    """A table; empty where there is none.

    Raises:
        ConfigError: the file is something else.
    """
    if not path.is_file():
        return {}
    try:
        table: _Table = json.loads(path.read_text())
        for ops in table.values():
            for buckets in ops.values():
                for sizes in buckets.values():
                    _check(sizes)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} is no table of tuned kernels ({error}); delete it, or write another with "
            "`tokenspeed kernels tune`"
        ) from error
    return table


def write_table(path: Path, device: str, found: Sequence[Found]) -> None:
    """Add what was found on a device to the table there."""
    table = read_table(path)
    for entry in found:
        buckets = table.setdefault(device, {}).setdefault(entry.op, {})
        buckets[entry.bucket] = dict(entry.sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True))
    _measured.cache_clear()


def _check(sizes: Mapping[str, int]) -> None:
    for name, value in sizes.items():
        if value not in CANDIDATES.get(name, ()):
            raise ValueError(f"{name} of {value!r}")


@functools.cache
def _measured(device: str) -> Mapping[_Key, Sizes]:
    ops = read_table(tuned_path()).get(device, {})
    return {(op, bucket): sizes for op, of in ops.items() for bucket, sizes in of.items()}


def _timed(
    calls: Sequence[Callable[[], object]],
    answers: Mapping[_Key, Sizes],
    time_us: Callable[[Sequence[Callable[[], object]]], float],
) -> float:
    with _trying(answers):
        return time_us(calls)


@contextmanager
def _trying(answers: Mapping[_Key, Sizes]) -> Iterator[_Trial]:
    assert _trial.get() is None, "one trial at a time"
    trial = _Trial(dict(answers))
    token = _trial.set(trial)
    try:
        yield trial
    finally:
        _trial.reset(token)
