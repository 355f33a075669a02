"""The operations port's own thread: a slow reader of metrics delays no token."""

import asyncio
import contextlib
import os
import socket
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from tokenspeed.core.errors import ConfigError, EngineError
from tokenspeed.entrypoint.gateway import is_loopback
from tokenspeed.entrypoint.operations.app import Operations, guarded_app
from tokenspeed.entrypoint.operations.chat import ChatProxy
from tokenspeed.entrypoint.operations.guard import HEADERS_SIZE_MAX_BYTES
from tokenspeed.entrypoint.operations.metrics import Metrics
from tokenspeed.entrypoint.operations.monitor import Monitor
from tokenspeed.entrypoint.operations.page import Page
from tokenspeed.entrypoint.operations.records import EndedRequest
from tokenspeed.entrypoint.operations.spans import SpanExport, otlp_provider

if TYPE_CHECKING:
    from tokenspeed.engine.facts import EngineInfo
    from tokenspeed.entrypoint.servicer import Servicer

__all__ = ["OperationsConfig", "OperationsServer"]

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_CONNECTIONS_MAX = 64
_KEEP_ALIVE_S = 15
_BACKLOG = 64
_CALM_TEMPERATURE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationsConfig:
    """Where the operations port is, and who may use it.

    Attributes:
        host, port: its address; port None tries `near_port`, then any free one.
        near_port: the port wanted where none is named.
        socket_path: a Unix socket instead, for its owner alone.
        api_key: what clients must send as a bearer token; None lets everyone in.
        health_timeout_s: an engine with work that runs no step for so long is unhealthy.
        otlp_endpoint: where OpenTelemetry spans go; None for nowhere.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    near_port: int = 8001
    socket_path: Path | None = None
    api_key: str | None = None
    health_timeout_s: float = 30.0
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        # Written so that what is no number is refused, too.
        if not self.health_timeout_s > 0:
            raise ConfigError(f"--health-timeout must be above 0, but is {self.health_timeout_s}")
        if self.socket_path is None and self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"--operations-host {self.host} can be reached from other machines: give an "
                "--api-key too, or leave the operations port on 127.0.0.1"
            )


class OperationsServer:
    """The operations port of a server. Made by `start`, ended by `stop`.

    Attributes:
        url: where it answers; for a Unix socket, its path behind `unix:`.
    """

    def __init__(self, servicers: "Sequence[Servicer]", config: OperationsConfig) -> None:
        """Raises ConfigError where the address cannot be served, or spans cannot be sent."""
        self._config = config
        self._metrics = Metrics()
        self._chat = ChatProxy(config.api_key)
        self._spans: SpanExport | None = None
        if config.otlp_endpoint is not None:
            self._spans = SpanExport(otlp_provider(config.otlp_endpoint))
        self._socket = _bound(config)
        self.url = _url(config, self._socket)
        # They have one book, and drain together.
        servicer = servicers[0]
        servicer.book.watch(self._take)
        self._monitor = Monitor(
            servicers,
            servicer.book,
            loop=asyncio.get_running_loop(),
            health_timeout_s=config.health_timeout_s,
        )
        operations = Operations(servicer, servicer.book, self._monitor, self._metrics)
        routes = operations.routes(page=Page(), chat=self._chat)
        loopback_only = config.socket_path is not None or is_loopback(config.host)
        self._server = _Server(
            uvicorn.Config(
                guarded_app(routes, api_key=config.api_key, loopback_only=loopback_only),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                h11_max_incomplete_event_size=HEADERS_SIZE_MAX_BYTES,
                http="h11",
                limit_concurrency=_CONNECTIONS_MAX,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._run, name="operations", daemon=True)

    @classmethod
    async def start(
        cls, servicers: "Sequence[Servicer]", config: OperationsConfig
    ) -> "OperationsServer":
        """Serve from now on.

        Args:
            servicers: of one server, one for each engine.
            config: where, and for whom.

        Raises:
            ConfigError: the address cannot be served.
            EngineError: the server did not come up.
        """
        made = cls(servicers, config)
        made._thread.start()
        if not await asyncio.to_thread(made._server.came_up.wait, _START_TIMEOUT_S):
            raise EngineError("the operations port did not come up; see the log")
        return made

    def connect(self, gateway_url: str, info: "EngineInfo") -> None:
        """Let the chat box speak to the gateway from now on."""
        self._chat.model = info.model_name
        # Small models that bring no defaults lose the thread at temperature 1.
        self._chat.temperature = None if info.default_sampling else _CALM_TEMPERATURE
        self._chat.gateway_url = gateway_url

    async def stop(self) -> None:
        """End the thread and its connections."""
        self._server.should_exit = True
        await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT_S)
        self._socket.close()
        if self._config.socket_path is not None:
            self._config.socket_path.unlink(missing_ok=True)

    def _take(self, request: EndedRequest) -> None:
        self._metrics.count(request)
        if self._spans is not None:
            self._spans.export(request)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        watching = asyncio.create_task(self._monitor.watch())
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            if self._spans is not None:
                self._spans.close()


class _Server(uvicorn.Server):
    """Uvicorn in a thread of ours: signals are the supervisor's, and it says when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.came_up = threading.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self.came_up.set()


def _bound(config: OperationsConfig) -> socket.socket:
    if config.socket_path is not None:
        return _bound_unix(config.socket_path)
    if config.port is not None:
        try:
            return _listening(config.host, config.port)
        except OSError as error:
            raise ConfigError(
                f"the operations port cannot be {config.host}:{config.port}: {error.strerror}. "
                "Choose another --operations-port, or 0 for none."
            ) from None
    with contextlib.suppress(OSError):
        return _listening(config.host, config.near_port)
    try:
        return _listening(config.host, 0)
    except OSError as error:
        raise ConfigError(
            f"--operations-host {config.host} is no address of this machine: {error.strerror}"
        ) from None


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(_BACKLOG)
    except OSError:
        made.close()
        raise
    return made


def _bound_unix(path: Path) -> socket.socket:
    """A socket that its owner alone may open. A socket nobody listens on is taken over."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise OSError(0, "somebody listens on it")
            path.unlink()
        # Linux gives the file the mode of the socket: it is never open to others.
        os.fchmod(made.fileno(), 0o600)
        made.bind(str(path))
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise ConfigError(
            f"--operations-socket {path} cannot be served: {error.strerror or error}"
        ) from None
    return made


def _url(config: OperationsConfig, bound: socket.socket) -> str:
    if config.socket_path is not None:
        return f"unix:{config.socket_path}"
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
