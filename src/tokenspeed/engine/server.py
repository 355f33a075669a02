"""The engine's side of the socket."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np
import zmq

from tokenspeed import loader
from tokenspeed.control import CacheEvents
from tokenspeed.core.errors import RequestError, TokenSpeedError
from tokenspeed.engine.core import Engine, step_timing
from tokenspeed.engine.facts import EngineStats
from tokenspeed.engine.outbox import Outbox
from tokenspeed.engine.wire import (
    Abort,
    Begun,
    CacheEventBatch,
    Call,
    Failed,
    Found,
    FromEngine,
    LoadProgress,
    Ready,
    Refused,
    Reply,
    Shutdown,
    Submit,
    decode_to_engine,
    encode,
    endpoint,
)

__all__ = ["serve"]

EngineBuilder = Callable[[loader.Progress, Callable[[Path], None]], Engine]
"""Tells of its progress, and of the tokenizer's folder as soon as it knows it."""

# How long an idle engine waits before it looks whether its parent still lives.
IDLE_POLL_MS = 500
# Load progress is for people's eyes.
PROGRESS_INTERVAL_S = 0.1
CLEARED = CacheEvents(
    kinds=np.array([2], dtype=np.int32),
    hashes=np.zeros(1, dtype=np.int64),
    parents=np.zeros(1, dtype=np.int64),
    has_parent=np.zeros(1, dtype=np.bool_),
    tokens=np.empty(0, dtype=np.int32),
)


def serve(
    build: EngineBuilder, socket_path: Path, *, parent_pid: int, stream_interval_s: float = 0.0
) -> int:
    """Build an engine and serve it. Returns the process's exit code.

    Args:
        build: makes the engine.
        socket_path: Unix-domain socket to bind; its folder must be the user's alone.
        parent_pid: the engine ends when its parent is no longer this process.
        stream_interval_s: the longest time for which the client lets a token wait; see `outbox`.
    """
    # The terminal sends Ctrl-C to every process of the group; ending is the parent's to order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _bound(socket_path) as socket:
        peer = _Peer(socket, parent_pid)
        outbox = Outbox(lambda messages: peer.send(*messages), interval_max_s=stream_interval_s)
        try:
            peer.send(Begun())
            engine = build(_PeerProgress(peer), lambda folder: peer.send(Found(str(folder))))
            with closing(engine.core):
                peer.send(Ready(engine.info))
                server = _Server(engine, peer, outbox)
                server.learn(engine.learning)
                server.run()
        except _ParentGone:
            return 1
        except Exception as error:
            if not isinstance(error, TokenSpeedError):
                traceback.print_exc()
            outbox.put(Failed(type(error).__name__, str(error)))
            return 1
    return 0


class _ParentGone(Exception):
    """The process that started this one has ended."""


class _Peer:
    """The client at the other end of the socket, as long as the parent process lives."""

    def __init__(self, socket: "zmq.Socket[bytes]", parent_pid: int) -> None:
        self._socket = socket
        self._parent_pid = parent_pid

    def send(self, *messages: FromEngine) -> None:
        """Send messages, which wake the client once; waits while none is connected."""
        while not self._socket.poll(IDLE_POLL_MS, zmq.POLLOUT):
            self.check_parent()
        # As parts of one: the first is not there before the last is. The client takes each by
        # itself.
        self._socket.send_multipart([encode(message) for message in messages])

    def wait(self, descriptor: int | None, check: Callable[[], None] | None) -> None:
        """Wait until a message is there, or a file descriptor has something.

        Args:
            descriptor: where there is one.
            check: called meanwhile.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if descriptor is not None:
            poller.register(descriptor, zmq.POLLIN)
        while not poller.poll(IDLE_POLL_MS):
            self.check_parent()
            if check is not None:
                check()

    def receive(self) -> list[bytes]:
        """Every message that is there."""
        messages: list[bytes] = []
        with suppress(zmq.Again):
            while True:
                messages.append(self._socket.recv(zmq.NOBLOCK))
        return messages

    def check_parent(self) -> None:
        """Raise _ParentGone when the parent has ended."""
        if os.getppid() != self._parent_pid:
            raise _ParentGone


class _Server:
    """Turns messages into calls of the core, and what the core gives into messages."""

    def __init__(self, engine: Engine, peer: _Peer, outbox: Outbox) -> None:
        self._core = engine.core
        self._check = engine.check
        self._peer = peer
        self._outbox = outbox
        self._running = True
        self._started_s = time.monotonic()
        self._rate = _Rate()
        self._cache_sequence = 0

    def learn(self, steps: Iterator[None]) -> None:
        """Make steps that teach, until the first request comes."""
        for _ in steps:
            self._take_all()
            if not (self._running and self._core.idle):
                return

    def run(self) -> None:
        """Step until told to stop."""
        while self._running:
            self._intake()
            outputs = self._core.step()
            for refused in self._core.take_refused():
                self._outbox.put(refused)
            if outputs is not None:
                self._rate.add(len(outputs.tokens) // 4)
                self._outbox.step(outputs, live=self._core.live)
            self._publish_cache_events()

    def _intake(self) -> None:
        """Take every message that waits; with nothing to do, wait for one."""
        if not self._core.busy:
            self._outbox.flush()
            self._peer.wait(self._core.wake_descriptor, self._check)
        self._take_all()

    def _take_all(self) -> None:
        self._peer.check_parent()
        for data in self._peer.receive():
            self._take(data)

    def _take(self, data: bytes) -> None:
        match decode_to_engine(data):
            case Submit() as message:
                self._outbox.submitted(message)
                try:
                    self._core.submit(message)
                except RequestError as error:
                    refused = Refused(message.request, type(error).__name__, str(error))
                    self._outbox.put(refused)
            case Abort(request):
                self._core.abort(request)
            case Call() as call:
                self._outbox.put(self._answer(call))
            case Shutdown():
                self._running = False

    def _answer(self, call: Call) -> Reply:
        runner, control, arguments = self._core.runner, self._core.control, call.arguments
        value: EngineStats | bool | str | list[list[int]] | None = None
        try:
            match call.method:
                case "stats":
                    value = self._stats()
                case "live_requests":
                    value = self._core.ledger.live(time.monotonic_ns() // 1000).tolist()
                case "flush_cache":
                    value = self._core.idle and control.flush_cache()
                case "start_profile":
                    folder, steps = arguments["output_dir"], arguments["steps"]
                    assert folder is None or isinstance(folder, str)
                    assert steps is None or isinstance(steps, int)
                    value = str(
                        runner.start_profile(None if folder is None else Path(folder), steps)
                    )
                case "stop_profile":
                    value = str(runner.stop_profile())
                case "subscribe_cache":
                    self._subscribe_cache(on=bool(arguments["on"]))
                case unknown:
                    raise AssertionError(f"no method {unknown!r}")
        except TokenSpeedError as error:
            return Reply(call.number, None, type(error).__name__, str(error))
        return Reply(call.number, value)

    def _stats(self) -> EngineStats:
        return EngineStats(
            **msgspec.structs.asdict(self._core.control.stats()),
            uptime_s=time.monotonic() - self._started_s,
            output_tokens_per_s=self._rate.per_s(),
            timing=step_timing(self._core),
        )

    def _subscribe_cache(self, *, on: bool) -> None:
        """Begin the events anew: everything is cleared, then what the cache holds is stored."""
        self._publish_cache_events()
        self._core.control.record_cache_events(False)
        if on:
            self._send_cache_batch(CLEARED)
            self._core.control.record_cache_events(True)
            self._publish_cache_events()

    def _publish_cache_events(self) -> None:
        events = self._core.control.take_cache_events()
        if events is not None:
            self._send_cache_batch(events)

    def _send_cache_batch(self, events: CacheEvents) -> None:
        self._cache_sequence += 1
        self._outbox.cache_events(
            CacheEventBatch(
                sequence=self._cache_sequence,
                kinds=events.kinds.tobytes(),
                hashes=events.hashes.tobytes(),
                parents=events.parents.tobytes(),
                has_parent=events.has_parent.tobytes(),
                tokens=events.tokens.tobytes(),
            )
        )


class _Rate:
    """Tokens a second over the last seconds, in O(1) memory."""

    WINDOW_S = 5.0

    def __init__(self) -> None:
        self._since_s = time.monotonic()
        self._count = 0
        self._last_per_s = 0.0

    def add(self, count: int) -> None:
        self._turn()
        self._count += count

    def per_s(self) -> float:
        self._turn()
        elapsed_s = time.monotonic() - self._since_s
        share = elapsed_s / self.WINDOW_S
        return self._count / self.WINDOW_S + self._last_per_s * (1.0 - share)

    def _turn(self) -> None:
        """Begin a new window when the present one is over."""
        elapsed_s = time.monotonic() - self._since_s
        if elapsed_s >= self.WINDOW_S:
            whole = elapsed_s < 2 * self.WINDOW_S
            self._last_per_s = self._count / self.WINDOW_S if whole else 0.0
            self._count = 0
            self._since_s += elapsed_s - elapsed_s % self.WINDOW_S


class _PeerProgress(loader.Progress):
    """Sends the progress of a load to the client, a few times a second."""

    def __init__(self, peer: _Peer) -> None:
        self._peer = peer
        self._sent_s = 0.0

    def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
        """Take a stage's progress."""
        now_s = time.monotonic()
        if done == total or now_s - self._sent_s >= PROGRESS_INTERVAL_S:
            self._sent_s = now_s
            self._peer.send(LoadProgress(stage, done, total, unit))


@contextmanager
def _bound(socket_path: Path) -> Iterator["zmq.Socket[bytes]"]:
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    # The last words of a failing engine should arrive.
    socket.setsockopt(zmq.LINGER, 1000)
    socket.bind(endpoint(socket_path))
    try:
        yield socket
    finally:
        socket.close()
        context.term()
