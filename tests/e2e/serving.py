"""`tokenspeed serve` as a subprocess, the way a user runs it."""

import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import psutil
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

T = TypeVar("T")

READY_TIMEOUT_S = 180
# Small enough that the whole pool is seen at a glance, large enough for every test.
FLAGS = ("--max-context", "1024", "--max-running", "16", "--kv-cache-memory", "96MiB")


class Serve:
    """A server on a free port. Leaving the context stops it with Ctrl-C, once."""

    def __init__(
        self,
        log: Path,
        *flags: str,
        model: str | None = None,
        launcher: Sequence[str] = ("-m", "tokenspeed.cli"),
    ) -> None:
        self.port = unused_port()
        self.log = log
        command = [sys.executable, *launcher, "serve"]
        command += [model] if model is not None else []
        command += ["--port", str(self.port), *FLAGS, *flags]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=file, start_new_session=True
            )
        self.ready_line = ""

    def __enter__(self) -> Self:
        try:
            self.ready_line = self._first_line()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.interrupt()
            self.process.wait(60)
        finally:
            self._kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def interrupt(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def family(self) -> list[psutil.Process]:
        """The server's process and every child."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def engine(self) -> psutil.Process:
        (found,) = [p for p in self.family() if "tokenspeed.engine" in " ".join(p.cmdline())]
        return found

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: bytes | dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body, whatever the status."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def operations_url(self) -> str:
        """Said by the line after the ready line; to be asked once."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        told = re.fullmatch(r"operations: (http://127\.0\.0\.1:\d+)\n", line)
        assert told is not None, line
        return told[1]

    def servicer(self) -> grpc.Channel:
        """A connection to the servicer, past the gateway."""
        (worker,) = self.get("/workers")["workers"]
        return grpc.insecure_channel(worker["url"].removeprefix("grpc://"))

    def counters(self, channel: grpc.Channel) -> dict[str, float]:
        """The scheduler's counters."""
        stub = pb_grpc.TokenSpeedSchedulerStub(channel)
        return dict(stub.GetServerInfo(pb.GetServerInfoRequest()).scheduler_info)

    def wait_until_idle(self, channel: grpc.Channel) -> dict[str, float]:
        """Wait until no request runs; the counters then."""
        return wait_for(
            lambda: self.counters(channel),
            lambda counters: counters["running"] == 0 and counters["waiting"] == 0,
        )

    def _first_line(self) -> str:
        """The ready line; fails with the log when the server ends or is silent."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(READY_TIMEOUT_S):
                raise AssertionError(f"not ready in {READY_TIMEOUT_S} s:\n{self.log.read_text()}")
        line = self.process.stdout.readline().decode()
        if not line:
            raise AssertionError(f"the server ended:\n{self.log.read_text()}")
        return line

    def _kill(self) -> None:
        if self.process.poll() is None:
            for process in self.family():
                process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(read: Callable[[], T], fits: Callable[[T], bool], timeout_s: float = 120) -> T:
    """Read until the value fits."""
    deadline_s = time.monotonic() + timeout_s
    while not fits(value := read()):
        assert time.monotonic() < deadline_s, f"still {value} after {timeout_s} s"
        time.sleep(0.02)
    return value


def run_cli(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `tokenspeed ARGUMENTS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "tokenspeed.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=os.environ,
    )
