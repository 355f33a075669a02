"""Starts an engine as a server, with the settings that suit it best, and stops it again."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from tokenspeed import loader
from tokenspeed.bench.peers.environments import llama_tool, python
from tokenspeed.bench.peers.exports import hf_folder, openvino_folder
from tokenspeed.core.environment import with_variables
from tokenspeed.core.errors import ConfigError, MeasurementError

__all__ = ["ENGINES", "Launch", "Server", "launch_of"]

_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a server is started; `variables` are added to the environment."""

    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.variables.items()]
        return " ".join([*words, Path(self.command[0]).name, *self.command[1:]])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    model: str
    users: int
    port: int
    threads: int
    context: int


def _tokenspeed(wanted: _Wanted) -> Launch:
    return Launch(
        command=(
            *(sys.executable, "-m", "tokenspeed.cli", "serve", wanted.model, "--no-curl"),
            *("--port", str(wanted.port), "--threads", str(wanted.threads)),
            # Peers keep no floor: every user is to be let in at once.
            *("--max-context", str(wanted.context), "--tps-floor", "0"),
        )
    )


def _llama(wanted: _Wanted) -> Launch:
    files = loader.resolve(wanted.model)
    # Repacked, the 1.5B model's prefill is slower.
    extra = ("--no-repack",) if wanted.model.endswith("1.5b") else ()
    return Launch(
        command=(
            *(str(llama_tool("llama-server")), "-m", str(files.path), "--port", str(wanted.port)),
            *("--host", "127.0.0.1", "-t", str(wanted.threads), "-fa", "on", "-ub", "512"),
            # A slot for each user, each with room for the longest session.
            *("-np", str(wanted.users), "-c", str(wanted.context * wanted.users), "--no-webui"),
            *extra,
        )
    )


def _vllm(wanted: _Wanted) -> Launch:
    folder = hf_folder(loader.resolve(wanted.model), wanted.model)
    return Launch(
        command=(
            *(str(python("vllm")), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder), "--served-model-name", wanted.model),
            *("--dtype", "bfloat16", "--max-model-len", str(wanted.context)),
            *("--max-num-seqs", "16", "--host", "127.0.0.1", "--port", str(wanted.port)),
            "--enable-prompt-tokens-details",
        ),
        variables={
            "VLLM_CPU_KVCACHE_SPACE": "3",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{wanted.threads - 1}",
        },
    )


def _openvino(wanted: _Wanted, weights: str) -> Launch:
    folder = openvino_folder(loader.resolve(wanted.model), wanted.model, weights)
    script = str(Path(__file__).with_name("openvino_server.py"))
    return Launch(
        command=(
            *(str(python("openvino")), script),
            *(str(folder), str(wanted.port), str(wanted.threads)),
        )
    )


ENGINES: Mapping[str, Callable[[_Wanted], Launch]] = {
    "tokenspeed": _tokenspeed,
    "llama.cpp": _llama,
    "vllm": _vllm,
    "openvino-int4": lambda wanted: _openvino(wanted, "int4"),
    "openvino-int8": lambda wanted: _openvino(wanted, "int8"),
}


def launch_of(
    engine: str, model: str, *, users: int, port: int, threads: int, context: int
) -> Launch:
    """How an engine is started for so many users; makes ready what it needs.

    Raises:
        ConfigError: no such engine.
        MeasurementError: it cannot be installed.
    """
    if engine not in ENGINES:
        raise ConfigError(f"--engines must be of {', '.join(ENGINES)}, but one is {engine!r}")
    return ENGINES[engine](
        _Wanted(model=model, users=users, port=port, threads=threads, context=context)
    )


def unused_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Server:
    """A server that answers on a port of loopback, until the block is left."""

    def __init__(self, launch: Launch, *, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._launch = launch
        self._log = log

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def __enter__(self) -> Self:
        """Start it, and wait until it says that it is ready.

        Raises:
            MeasurementError: it ended, or said nothing for ten minutes; the log tells why.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._launch.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=with_variables(self._launch.variables),
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self._stop(signal.SIGKILL)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Not what Ctrl-C sends: where this process was started in the background that is ignored,
        # and so it is by whatever it starts.
        self._stop(signal.SIGTERM)

    def _wait(self) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise MeasurementError(
                    f"the server ended with {self._process.returncode} before it was ready; see "
                    f"{self._log}"
                )
            try:
                if httpx.get(f"{self.url}/health", timeout=2, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise MeasurementError(
            f"the server was not ready within {_START_TIMEOUT_S:g} s; see {self._log}"
        )

    def _stop(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        # Its own session, so its own group: whatever it started and left behind ends with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
