"""Where constraints are tried out and compiled: a worker process, and the threads that speak to it.

Begun by the first constraint; what imports this has the library of grammars.
"""

import contextlib
import itertools
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import llguidance
import msgspec

from tokenspeed.core.constraint import ConstraintKind
from tokenspeed.core.errors import InvalidParameter
from tokenspeed.grammar.matcher import Grammar
from tokenspeed.grammar.outcomes import Key, Outcome, Refusal
from tokenspeed.grammar.pipe import Begin, Cancel, FromWorker, Reader, Trial, Verdict, encode
from tokenspeed.grammar.stack import deep_stacks
from tokenspeed.grammar.tokens import TokenTable, native_tokens

__all__ = ["Desk"]

_STOP_TIMEOUT_S = 5.0


class Desk:
    """The threads beside the engine: one that sends trials and compiles, one that reads verdicts.

    Args:
        finish: called with each outcome, from either thread.
    """

    def __init__(
        self,
        table: Callable[[], TokenTable],
        encode: Callable[[bytes], Sequence[int]],
        limits: tuple[int, int],
        finish: Callable[[Key, Outcome, bool], None],
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
        self._trials: dict[int, tuple[Key, subprocess.Popen[bytes]]] = {}
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._clerk = _thread("constraints", self._work)

    def begin(self, key: Key) -> None:
        """Try a constraint, then compile it."""
        self._jobs.put(lambda: self._try(key))

    def cancel(self, key: Key) -> None:
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

    def _try(self, key: Key) -> None:
        try:
            if self._worker is None or self._worker.poll() is not None:
                self._worker = self._start()
            number = next(self._numbers)
            with self._lock:
                self._trials[number] = (key, self._worker)
            self._send(Trial(number, *key))
        except Exception as error:
            self._fail(key, error)

    def _cancel(self, key: Key) -> None:
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

    def _compile(self, key: Key, text: str) -> None:
        assert self._tokens is not None
        try:
            self._finish(key, Grammar(self._tokens, text), True)
        except BaseException as error:
            # A panic of the library is no Exception, and this thread must outlive it.
            self._fail(key, error)

    def _fail(self, key: Key, error: BaseException) -> None:
        self._finish(key, _refusal(key[0], str(error) or type(error).__name__), False)


def _refusal(kind: ConstraintKind, reason: str) -> Refusal:
    return Refusal(f"the {kind} constraint cannot be enforced: {reason}")


def _thread(name: str, target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    with deep_stacks():
        thread.start()
    return thread
