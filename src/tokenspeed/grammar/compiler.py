"""Constraints compiled beside the engine's steps.

A constraint is first tried out in a process that may be killed (`worker.py`); only the grammar that
came through is compiled in this one, by a thread that leaves the interpreter to others (`desk.py`).
Compiled grammars are kept, and so is what was found wrong with those that cannot be.
"""

import contextlib
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.core.errors import InvalidParameter, Overloaded
from tokenspeed.grammar.outcomes import Key, Outcome
from tokenspeed.grammar.tokens import TokenTable

if TYPE_CHECKING:
    from tokenspeed.grammar.desk import Desk

__all__ = ["CompiledConstraint", "ConstraintCompiler"]

# Seconds of CPU. A schema of 3,000 properties takes 0.15.
TIME_MAX_S = 3
MEMORY_MAX_BYTES = 1 << 30
KEPT_MAX = 256
KEPT_SIZE_MAX_BYTES = 16 << 20
WAITING_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledConstraint:
    """What became of a request's constraint: its grammar, or why there is none."""

    request: int
    outcome: Outcome


class ConstraintCompiler:
    """Compiles the constraints of requests. Used by one thread; nothing here waits but `close`.

    Processes, threads and the library's form of the tokens begin with the first constraint.

    Args:
        table: gives the model's tokens, called from another thread.
        encode: text to tokens, called from another thread.
        time_max_s, memory_max_bytes: what a constraint may take to be tried out.

    Attributes:
        descriptor: readable while `take` has something to give.
    """

    def __init__(
        self,
        table: Callable[[], TokenTable],
        encode: Callable[[bytes], Sequence[int]],
        *,
        time_max_s: int = TIME_MAX_S,
        memory_max_bytes: int = MEMORY_MAX_BYTES,
    ) -> None:
        self._table = table
        self._encode = encode
        self._limits = (time_max_s, memory_max_bytes)
        self._known: OrderedDict[Key, Outcome] = OrderedDict()
        self._known_size_bytes = 0
        self._waiting: dict[Key, set[int]] = {}
        self._wanted: dict[int, Key] = {}
        self._ready: list[CompiledConstraint] = []
        self._done: deque[tuple[Key, Outcome, bool]] = deque()
        self._desk: Desk | None = None
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __len__(self) -> int:
        """How many requests wait for their grammar."""
        return len(self._wanted) + len(self._ready)

    def submit(self, request: int, constraint: StructuredOutputs) -> None:
        """Ask for a grammar; `take` gives it, at once if it is known.

        Raises:
            Overloaded: too many requests wait.
            InvalidParameter: what compiles constraints is not installed.
        """
        if len(self) >= WAITING_MAX:
            raise Overloaded(
                f"{WAITING_MAX} requests wait for their constraints to be compiled; retry after "
                "1 s",
                retry_after_s=1.0,
            )
        key = (constraint.kind, constraint.text)
        if (outcome := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            self._ready.append(CompiledConstraint(request=request, outcome=outcome))
            os.eventfd_write(self.descriptor, 1)
            return
        if self._desk is None:
            self._desk = self._opened()
        self._wanted[request] = key
        if key in self._waiting:
            self._waiting[key].add(request)
            return
        self._waiting[key] = {request}
        self._desk.begin(key)

    def cancel(self, request: int) -> bool:
        """Forget a request; False if it does not wait."""
        before = len(self)
        self._ready = [item for item in self._ready if item.request != request]
        if (key := self._wanted.pop(request, None)) is not None:
            self._waiting[key].discard(request)
            if not self._waiting[key]:
                del self._waiting[key]
                assert self._desk is not None
                self._desk.cancel(key)
        return len(self) < before

    def take(self) -> list[CompiledConstraint]:
        """What has become ready since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        while self._done:
            key, outcome, lasting = self._done.popleft()
            if lasting:
                self._keep(key, outcome)
            for request in sorted(self._waiting.pop(key, ())):
                del self._wanted[request]
                self._ready.append(CompiledConstraint(request=request, outcome=outcome))
        ready, self._ready = self._ready, []
        return ready

    def close(self) -> None:
        """End the worker and the threads; requests that wait are forgotten."""
        if self._desk is not None:
            self._desk.close()
        os.close(self.descriptor)

    def _opened(self) -> "Desk":
        # An engine that constrains nothing needs none of what this imports.
        try:
            from tokenspeed.grammar.desk import Desk  # noqa: PLC0415
        except ImportError as error:
            raise InvalidParameter(
                f"structured_outputs needs the package {error.name}, which is not installed: "
                f"`pip install {error.name}`, or leave it out"
            ) from None
        return Desk(self._table, self._encode, self._limits, self._finish)

    def _finish(self, key: Key, outcome: Outcome, lasting: bool) -> None:
        """From any thread."""
        self._done.append((key, outcome, lasting))
        os.eventfd_write(self.descriptor, 1)

    def _keep(self, key: Key, outcome: Outcome) -> None:
        self._known[key] = outcome
        self._known_size_bytes += len(key[1])
        while len(self._known) > KEPT_MAX or self._known_size_bytes > KEPT_SIZE_MAX_BYTES:
            (_, text), _ = self._known.popitem(last=False)
            self._known_size_bytes -= len(text)
