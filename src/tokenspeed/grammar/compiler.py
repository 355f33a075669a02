"""Constraints compiled beside the engine's steps.

A constraint is first tried out in a process that may be killed (`worker.py`); only the grammar that
came through is compiled here, in a thread that leaves the interpreter to others. Compiled grammars
are kept, and so is what was found wrong with those that cannot be.
"""

import contextlib
import itertools
import os
import queue
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llguidance
import msgspec

from tokenspeed.core.constraint import ConstraintKind, StructuredOutputs
from tokenspeed.core.errors import InvalidParameter, Overloaded, RequestError
from tokenspeed.grammar.matcher import Grammar
from tokenspeed.grammar.pipe import Begin, Cancel, FromWorker, Reader, Trial, Verdict, encode
from tokenspeed.grammar.stack import deep_stacks
from tokenspeed.grammar.tokens import TokenTable, native_tokens

__all__ = ["CompiledConstraint", "ConstraintCompiler", "Refusal"]

# Seconds of CPU. A schema of 3,000 properties takes 0.15.
TIME_MAX_S = 3
MEMORY_MAX_BYTES = 1 << 30
KEPT_MAX = 256
KEPT_SIZE_MAX_BYTES = 16 << 20
WAITING_MAX = 1024
_STOP_TIMEOUT_S = 5.0

_Key = tuple[ConstraintKind, str]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no grammar. Kept, as an error with its traceback should not be.

    Attributes:
        reason: for people.
        of_request: whether the constraint is to blame, so that to try again is of no use.
    """

    reason: str
    of_request: bool = True

    def error(self) -> RequestError:
        """As something to raise."""
        return (InvalidParameter if self.of_request else RequestError)(self.reason)


Outcome = Grammar | Refusal


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
        self._known: OrderedDict[_Key, Outcome] = OrderedDict()
        self._known_size_bytes = 0
        self._waiting: dict[_Key, set[int]] = {}
        self._wanted: dict[int, _Key] = {}
        self._ready: list[CompiledConstraint] = []
        self._done: deque[tuple[_Key, Outcome, bool]] = deque()
        self._desk: _Desk | None = None
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __len__(self) -> int:
        """How many requests wait for their grammar."""
        return len(self._wanted) + len(self._ready)

    def submit(self, request: int, constraint: StructuredOutputs) -> None:
        """Ask for a grammar; `take` gives it, at once if it is known.

        Raises:
            Overloaded: too many requests wait.
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
        self._wanted[request] = key
        if key in self._waiting:
            self._waiting[key].add(request)
            return
        self._waiting[key] = {request}
        if self._desk is None:
            self._desk = _Desk(self._table, self._encode, self._limits, self._finish)
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

    def _finish(self, key: _Key, outcome: Outcome, lasting: bool) -> None:
        """From any thread."""
        self._done.append((key, outcome, lasting))
        os.eventfd_write(self.descriptor, 1)

    def _keep(self, key: _Key, outcome: Outcome) -> None:
        self._known[key] = outcome
        self._known_size_bytes += len(key[1])
        while len(self._known) > KEPT_MAX or self._known_size_bytes > KEPT_SIZE_MAX_BYTES:
            (_, text), _ = self._known.popitem(last=False)
            self._known_size_bytes -= len(text)


class _Desk:
    """The threads beside the engine: one that sends trials and compiles, one that reads verdicts.

    Args:
        finish: called with each outcome, from either thread.
    """

    def __init__(
        self,
        table: Callable[[], TokenTable],
        encode: Callable[[bytes], Sequence[int]],
        limits: tuple[int, int],
        finish: Callable[[_Key, Outcome, bool], None],
    ) -> None:
        self._make_table = table
        self._table: TokenTable | None = None
        self._encode = encode
        self._limits = limits
        self._finish = finish
        self._tokens: llguidance.LLTokenizer | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._numbers = itertools.count(1)
        # Trials whose verdict is to come, and whose it will be; both threads touch them.
        self._trials: dict[int, tuple[_Key, subprocess.Popen[bytes]]] = {}
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._clerk = _thread("constraints", self._work)

    def begin(self, key: _Key) -> None:
        """Try a constraint, then compile it."""
        self._jobs.put(lambda: self._try(key))

    def cancel(self, key: _Key) -> None:
        """End the trial of a constraint, if it is under way."""
        self._jobs.put(lambda: self._cancel(key))

    def close(self) -> None:
        """End both threads and the worker."""
        self._jobs.put(None)
        self._clerk.join(_STOP_TIMEOUT_S)
        if self._worker is not None and self._reader is not None:
            self._worker.kill()
            self._reader.join(_STOP_TIMEOUT_S)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _try(self, key: _Key) -> None:
        try:
            if self._worker is None or self._worker.poll() is not None:
                self._worker = self._start()
            number = next(self._numbers)
            with self._lock:
                self._trials[number] = (key, self._worker)
            self._send(Trial(number, *key))
        except Exception as error:
            self._fail(key, error)

    def _cancel(self, key: _Key) -> None:
        with self._lock:
            numbers = [number for number, trial in self._trials.items() if trial[0] == key]
            for number in numbers:
                del self._trials[number]
        for number in numbers:
            # Nobody waits: that the worker has ended meanwhile is the next one's to find out.
            with contextlib.suppress(OSError, ValueError):
                self._send(Cancel(number))

    def _start(self) -> "subprocess.Popen[bytes]":
        # It comes up while the tokens are gathered here.
        worker = subprocess.Popen(
            [sys.executable, "-m", "tokenspeed.grammar.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._worker = worker
        self._reader = _thread("verdicts", lambda: self._listen(worker))
        if self._table is None:
            self._table = self._make_table()
        if not self._table.ends:
            worker.kill()
            raise InvalidParameter("the model's tokenizer names no token that ends a text")
        self._send(Begin(self._table, *self._limits))
        if self._tokens is None:
            self._tokens = native_tokens(self._table, self._encode)
        return worker

    def _send(self, message: Begin | Trial | Cancel) -> None:
        assert self._worker is not None
        assert self._worker.stdin is not None
        self._worker.stdin.write(encode(message))
        self._worker.stdin.flush()

    def _listen(self, worker: "subprocess.Popen[bytes]") -> None:
        """Read verdicts until the worker ends; then no trial of its is to come to one."""
        assert worker.stdout is not None
        reader = Reader(worker.stdout.fileno(), FromWorker)
        with contextlib.suppress(OSError, msgspec.DecodeError):
            while not reader.ended:
                for verdict in reader.read():
                    assert isinstance(verdict, Verdict)
                    self._judge(verdict)
        worker.kill()
        with contextlib.suppress(OSError), worker:
            # Leaving closes its pipes, and waits for it.
            pass
        with self._lock:
            left = [number for number, trial in self._trials.items() if trial[1] is worker]
            keys = [self._trials.pop(number)[0] for number in left]
        for key in keys:
            self._finish(
                key,
                Refusal("the process that compiles constraints has ended; try again", False),
                False,
            )

    def _judge(self, verdict: Verdict) -> None:
        with self._lock:
            trial = self._trials.pop(verdict.number, None)
        if trial is None:
            return
        key = trial[0]
        if verdict.grammar is not None:
            grammar = verdict.grammar
            self._jobs.put(lambda: self._compile(key, grammar))
        else:
            self._finish(key, _refusal(key[0], verdict.refusal or ""), verdict.lasting)

    def _compile(self, key: _Key, text: str) -> None:
        assert self._tokens is not None
        try:
            self._finish(key, Grammar(self._tokens, text), True)
        except BaseException as error:
            # A panic of the library is no Exception, and this thread must outlive it.
            self._fail(key, error)

    def _fail(self, key: _Key, error: BaseException) -> None:
        self._finish(key, _refusal(key[0], str(error) or type(error).__name__), False)


def _refusal(kind: ConstraintKind, reason: str) -> Refusal:
    return Refusal(f"the {kind} constraint cannot be enforced: {reason}")


def _thread(name: str, target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    with deep_stacks():
        thread.start()
    return thread
