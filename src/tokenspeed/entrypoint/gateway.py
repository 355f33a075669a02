"""The SMG gateway as a child process: its command line, its start and its end."""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from tokenspeed.core.errors import ConfigError, EngineError
from tokenspeed.entrypoint.parsers import Parsers

__all__ = [
    "REQUESTS_MAX",
    "Gateway",
    "GatewayConfig",
    "check_address",
    "check_exposure",
    "gateway_arguments",
    "is_loopback",
    "unused_port",
]

LOG_LINES_MAX = 400
_CAUSE_LINES = 12
# The last answers of the engine are on their way through the gateway for this long at most.
_LAST_WORDS_S = 0.5
_POLL_INTERVAL_S = 0.05
_REQUEST_TIMEOUT_S = 7200
_PAYLOAD_SIZE_MAX_BYTES = 32 * 1024 * 1024
# Requests at once, those that wait for their turn in the engine among them. One more gets 429 with
# a Retry-After at once: a queue of the gateway's before the engine's would know nothing of turns.
REQUESTS_MAX = 1024
# A stream that says nothing carries a sign of life this often; HTTP clients of agents give up
# after five seconds of silence at the earliest.
_KEEPALIVE_S = 2
# Made of `csrc/gateway` by `make gateway-plugin`.
_PLUGIN = Path(__file__).with_name("gateway_requests.wasm")
_COLOUR = re.compile(rb"\x1b\[[0-9;]*m")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What one gateway is launched with.

    Attributes:
        host, port: where clients connect.
        worker_ports: ports of the servicers on 127.0.0.1, one for each engine.
        page_size: token positions of the engines' KV pages, by which the gateway knows what each
            has cached.
        prometheus_port: port of the gateway's own metrics on 127.0.0.1.
        tokenizer_dir: folder of the tokenizer the gateway encodes with.
        parsers: which parsers read tool calls and reasoning.
        api_key: what clients must send as a bearer token; None lets everyone in.
        log_level: "debug", "info", "warn" or "error".
        encoding_cache: keep what the beginnings of prompts were encoded to, up to where a special
            token stands; each turn of a conversation then encodes what is new.
        shutdown_timeout_s: how long running requests may take to end when the gateway stops.
    """

    host: str
    port: int
    worker_ports: tuple[int, ...]
    prometheus_port: int
    tokenizer_dir: Path
    parsers: Parsers
    page_size: int = 32
    api_key: str | None = None
    log_level: str = "warn"
    encoding_cache: bool = True
    shutdown_timeout_s: int = 10

    def __post_init__(self) -> None:
        check_exposure(self.host, self.api_key)


def gateway_arguments(config: GatewayConfig) -> list[str]:
    """The arguments of `smg` for a gateway with a worker for each engine."""
    arguments = [
        "launch",
        *("--host", config.host),
        *("--port", str(config.port)),
        *("--prometheus-host", "127.0.0.1"),
        *("--prometheus-port", str(config.prometheus_port)),
        *("--worker-urls", *(f"grpc://127.0.0.1:{port}" for port in config.worker_ports)),
        *("--worker-startup-check-interval", "1"),
        *_routing(config),
        *("--tokenizer-path", str(config.tokenizer_dir)),
        *("--tool-call-parser", config.parsers.tool_call),
        *("--reasoning-parser", config.parsers.reasoning),
        "--disable-circuit-breaker",
        "--disable-worker-overload-protection",
        *("--health-check-interval-secs", "2"),
        *("--health-check-timeout-secs", "10"),
        *("--health-success-threshold", "1"),
        # A long step of a small machine is no wedged worker.
        *("--worker-wedge-secs", "120"),
        *("--worker-stale-secs", "0"),
        *("--request-timeout-secs", str(_REQUEST_TIMEOUT_S)),
        *("--max-payload-size", str(_PAYLOAD_SIZE_MAX_BYTES)),
        *("--max-concurrent-requests", str(REQUESTS_MAX)),
        *("--queue-size", "0"),
        *("--sse-keepalive-secs", str(_KEEPALIVE_S)),
        *("--shutdown-grace-period-secs", str(config.shutdown_timeout_s)),
        *("--log-level", config.log_level),
        "--enable-wasm",
    ]
    if config.encoding_cache:
        arguments.append("--tokenizer-cache-enable-l1")
    if config.api_key is not None:
        arguments += ["--api-key", config.api_key]
    return arguments


def _routing(config: GatewayConfig) -> list[str]:
    """How a worker is chosen, and what is done about one that fails."""
    if len(config.worker_ports) == 1:
        # With one worker there is nothing to balance; prefixes match in the engine. A failed
        # request is the client's to repeat: retries would come to the same worker.
        return ["--policy", "passthrough", "--disable-retries"]
    return [
        # By what each engine says that it has cached, unless it is far busier than the others.
        *("--policy", "cache_aware"),
        *("--block-size", str(config.page_size)),
        # An engine that ended says so at the next look.
        *("--health-failure-threshold", "1"),
    ]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name counts by what it resolves to."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error}") from None
    addresses = [str(address[0]).split("%")[0] for *_, address in found]
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def check_exposure(host: str, api_key: str | None) -> None:
    """Raises ConfigError when others could reach the server without a key."""
    if api_key is not None and not api_key:
        raise ConfigError("--api-key is empty; give a key, or leave the flag out on loopback")
    if api_key is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines: give an --api-key too, "
            "or serve on --host 127.0.0.1"
        )


def check_address(host: str, port: int) -> None:
    """Raises ConfigError when the address cannot be served, as when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OverflowError:
            raise ConfigError(f"--port must be in [1, 65535], but is {port}") from None
        except OSError as error:
            raise ConfigError(
                f"cannot serve on {host}:{port}: {error.strerror}. "
                "Choose another --port, or end what listens there."
            ) from None


def unused_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Gateway:
    """A running gateway process. Made by `launch`.

    Attributes:
        exited: done when the process has ended; its result is the exit code.
    """

    def __init__(self, process: asyncio.subprocess.Process, config: GatewayConfig) -> None:
        self._process = process
        self._config = config
        self._log: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self._reader = asyncio.create_task(self._read())
        self.exited: asyncio.Task[int] = asyncio.create_task(self._watch())

    @classmethod
    async def launch(cls, config: GatewayConfig) -> "Gateway":
        """Start the process; it is ready when `wait_ready` returns."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tokenspeed.entrypoint.gateway_child",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # Ctrl-C goes to the foreground group; stopping the gateway is the supervisor's to do.
            start_new_session=True,
        )
        assert process.stdin is not None
        order = {"parent_pid": os.getpid(), "arguments": gateway_arguments(config)}
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(order).encode())
            await process.stdin.drain()
            process.stdin.close()
        return cls(process, config)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Where clients of this machine reach it."""
        host = _reachable(self._config.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self._config.port}"

    async def wait_ready(self, *, model_name: str, timeout_s: float) -> None:
        """Return once a first request will be served: worker healthy and tokenizer loaded.

        Raises:
            EngineError: the gateway ended, or was not ready in time; with its last log lines.
        """
        headers = {}
        if self._config.api_key is not None:
            headers["Authorization"] = f"Bearer {self._config.api_key}"
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False
        ) as client:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while not self.exited.done():
                        if await _is_ready(client, model_name):
                            return await _add_plugin(client)
                        await asyncio.sleep(_POLL_INTERVAL_S)
        raise EngineError(self.cause())

    async def stop(self, *, is_idle: Callable[[], bool]) -> None:
        """End the process: running requests get the configured time, then it is killed.

        Args:
            is_idle: whether no request runs. The gateway itself lingers for seconds when it is
                terminated, so that it is killed as soon as nobody waits for it.
        """
        with contextlib.suppress(ProcessLookupError, asyncio.TimeoutError):
            if not self.exited.done():
                self._process.terminate()
            async with asyncio.timeout(self._config.shutdown_timeout_s):
                idle_since_s = time.monotonic()
                while not self.exited.done():
                    await asyncio.sleep(_POLL_INTERVAL_S)
                    if not is_idle():
                        idle_since_s = time.monotonic()
                    elif time.monotonic() - idle_since_s > _LAST_WORDS_S:
                        break
        self.kill()
        await self.exited

    def kill(self) -> None:
        """End the process at once."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def cause(self) -> str:
        """Why the gateway is not serving: its exit code and the last it said."""
        code = self._process.returncode
        state = "is not ready" if code is None else f"ended with exit code {code}"
        lines = [f"  {line}" for line in list(self._log)[-_CAUSE_LINES:]]
        return "\n".join([f"the gateway {state}; its last words:", *lines])

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            text = _COLOUR.sub(b"", line).decode(errors="replace").rstrip()
            self._log.append(text)
            if self._config.log_level == "debug":
                print(f"gateway: {text}", file=sys.stderr)  # noqa: T201

    async def _watch(self) -> int:
        code = await self._process.wait()
        await self._reader
        return code


async def _is_ready(client: httpx.AsyncClient, model_name: str) -> bool:
    # The gateway lists a tokenizer before it has read it, and may call itself ready meanwhile:
    # what counts is that it renders a conversation and encodes it.
    message = {"role": "user", "content": "hello"}
    asked = {"model": model_name, "messages": [message]}
    try:
        if not (await client.get("/readiness")).is_success:
            return False
        return (await client.post("/v1/messages/count_tokens", json=asked)).is_success
    except httpx.TransportError:
        return False


async def _add_plugin(client: httpx.AsyncClient) -> None:
    """Have requests of agents rewritten that the gateway would refuse (`csrc/gateway`)."""
    # The gateway reads no plugin below /root and some other folders.
    with tempfile.TemporaryDirectory(prefix="tokenspeed-", dir="/tmp") as folder:
        copy = Path(shutil.copy(_PLUGIN, folder))
        module = {
            "name": copy.stem,
            "file_path": str(copy),
            "module_type": "Middleware",
            "attach_points": [{"Middleware": "OnRequest"}],
        }
        try:
            answer = await client.post("/wasm", json={"modules": [module]})
        except httpx.TransportError as error:
            said = str(error)
        else:
            said = answer.text
    if '"Success"' not in said:
        _log.warning("the gateway took no plugin, and will refuse what Codex sends: %s", said)


def _reachable(host: str) -> str:
    """An address to connect to: that of loopback where the gateway listens on every one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not address.is_unspecified:
        return host
    return "127.0.0.1" if address.version == 4 else "::1"
