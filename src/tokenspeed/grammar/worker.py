"""The process in which constraints are tried out: `python -m tokenspeed.grammar.worker`.

It reads the tokens once and forks for every trial, so that a trial which takes too much time or
memory, or ends the process it runs in, ends nothing else; the next one begins at once. It ends when
its standard input does. Imports no torch and no tokenizer.
"""

import contextlib
import gc
import os
import resource
import selectors
import signal
import sys
import time
from dataclasses import dataclass

import llguidance

from tokenspeed.core.errors import InvalidParameter
from tokenspeed.grammar.pipe import Begin, Cancel, Reader, ToWorker, Trial, Verdict, encode
from tokenspeed.grammar.stack import TRIAL_STACK_SIZE_BYTES
from tokenspeed.grammar.tokens import longest_match, native_tokens
from tokenspeed.grammar.trial import tried

__all__ = ["TRIALS_MAX", "main"]

TRIALS_MAX = 2
"""Trials that run at once."""

# On a busy machine a trial gets a part of a CPU.
_WALL_PER_CPU = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A trial's process."""

    number: int
    pid: int
    deadline_s: float


class _Worker:
    """Trials that wait, and trials that run."""

    def __init__(self, begin: Begin, commands: Reader) -> None:
        self._begin = begin
        self._tokens = native_tokens(begin.table, longest_match(begin.table))
        self._commands = commands
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        self._waiting: dict[int, Trial] = {}
        self._running: dict[int, _Running] = {}
        # What the fork finds here it does not copy.
        gc.collect()
        gc.freeze()

    def run(self, messages: list[object]) -> None:
        """Serve until the input ends; `messages` have come already."""
        try:
            self._take(messages)
            while not self._commands.ended:
                self._start()
                for key, _ in self._selector.select(self._patience_s()):
                    if key.fd in self._running:
                        self._finish(key.fd)
                    else:
                        self._take(self._commands.read())
                self._end_late()
        finally:
            for running in self._running.values():
                _kill(running.pid)

    def _take(self, messages: list[object]) -> None:
        for message in messages:
            match message:
                case Trial(number):
                    self._waiting[number] = message
                case Cancel(number):
                    self._waiting.pop(number, None)
                    for descriptor, running in list(self._running.items()):
                        if running.number == number:
                            self._drop(descriptor)

    def _start(self) -> None:
        while self._waiting and len(self._running) < TRIALS_MAX:
            trial = self._waiting.pop(next(iter(self._waiting)))
            readable, writable = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(readable)
                self._try(trial, writable)
            os.close(writable)
            deadline_s = time.monotonic() + self._begin.time_max_s * _WALL_PER_CPU
            self._running[readable] = _Running(number=trial.number, pid=pid, deadline_s=deadline_s)
            self._selector.register(readable, selectors.EVENT_READ)

    def _try(self, trial: Trial, descriptor: int) -> None:
        """In the process of the trial, and the last thing it does."""
        status = 1
        try:
            _limit(self._begin)
            verdict = _verdict(trial, self._begin, self._tokens)
            with os.fdopen(descriptor, "wb") as file:
                file.write(encode(verdict))
            status = 0
        finally:
            os._exit(status)

    def _finish(self, descriptor: int) -> None:
        """Hand a trial's verdict on, or say what its silence means."""
        running = self._running[descriptor]
        data = bytearray()
        # It writes at once and ends, or ends without.
        while part := os.read(descriptor, 1 << 16):
            data += part
        self._drop(descriptor)
        if not data:
            data += encode(Verdict(running.number, None, self._too_much()))
        _write(bytes(data))

    def _end_late(self) -> None:
        now_s = time.monotonic()
        for descriptor, running in list(self._running.items()):
            if running.deadline_s <= now_s:
                self._drop(descriptor)
                _write(encode(Verdict(running.number, None, self._too_much(), lasting=False)))

    def _too_much(self) -> str:
        return (
            f"it is too complex: {self._begin.time_max_s} s and "
            f"{self._begin.memory_max_bytes >> 20} MiB do not suffice to compile it"
        )

    def _drop(self, descriptor: int) -> None:
        running = self._running.pop(descriptor)
        self._selector.unregister(descriptor)
        os.close(descriptor)
        _kill(running.pid)

    def _patience_s(self) -> float | None:
        if not self._running:
            return None
        first_s = min(running.deadline_s for running in self._running.values())
        return max(0.0, first_s - time.monotonic())


def main() -> int:
    """Serve one engine."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    commands = Reader(sys.stdin.fileno(), ToWorker)
    while not commands.ended:
        if messages := commands.read():
            assert isinstance(messages[0], Begin)
            _Worker(messages[0], commands).run(messages[1:])
    return 0


def _limit(begin: Begin) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A fork's clock of CPU time begins at zero.
    resource.setrlimit(resource.RLIMIT_CPU, (begin.time_max_s, begin.time_max_s))
    with open("/proc/self/statm") as file:  # noqa: PTH123
        pages = int(file.read().split()[0])
    size_bytes = pages * resource.getpagesize() + begin.memory_max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))
    resource.setrlimit(resource.RLIMIT_STACK, (TRIAL_STACK_SIZE_BYTES,) * 2)
    # What a dying library says is for nobody, and that the worker has died shows at the ends of its
    # pipes, which must not stay open here.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        os.dup2(nothing, stream.fileno())


def _verdict(trial: Trial, begin: Begin, tokens: llguidance.LLTokenizer) -> Verdict:
    try:
        grammar = tried(trial.kind, trial.text, table=begin.table, tokens=tokens)
    except InvalidParameter as refusal:
        return Verdict(trial.number, None, str(refusal))
    return Verdict(trial.number, grammar)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _write(data: bytes) -> None:
    """To the engine; one that is gone shows at the input's end."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
