"""Keeps an engine, the servicer and the gateway together: all serve, or none is left."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop

from tokenspeed import loader
from tokenspeed.cli.progress import load_progress
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import torchrun
from tokenspeed.core.errors import ConfigError, EngineDead, EngineError, TokenSpeedError
from tokenspeed.engine.process import EngineProcess
from tokenspeed.engine.wire import EngineInfo
from tokenspeed.entrypoint.gateway import (
    Gateway,
    GatewayConfig,
    check_address,
    check_exposure,
    unused_port,
)
from tokenspeed.entrypoint.operations.server import OperationsConfig, OperationsServer
from tokenspeed.entrypoint.parsers import (
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    Parsers,
    choose_parsers,
    lacks_tool_parser,
    read_template,
)
from tokenspeed.entrypoint.servicer import Servicer, start_server

__all__ = ["ServeOptions", "supervise"]

_log = logging.getLogger(__name__)

_GATEWAY_TIMEOUT_S = 60.0
_RESTARTS_IN_A_ROW_MAX = 5
_BACKOFF_MAX_S = 30.0
# An engine that served this long has recovered; the count of restarts begins anew.
_STABLE_AFTER_S = 60.0
_GATEWAY_LEVELS = {"debug": "debug", "info": "warn", "warning": "warn", "error": "error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `tokenspeed serve` was asked for; the fields are its flags.

    Attributes:
        curl: print a curl when ready; None for on a terminal.
        operations: the operations port; None for none.
    """

    engine: EngineConfig
    host: str
    port: int
    api_key: str | None
    tool_call_parser: str | None
    reasoning_parser: str | None
    token_exact_history: bool
    restart: bool
    curl: bool | None
    shutdown_timeout_s: int
    log_level: str
    operations: OperationsConfig | None = None


def supervise(options: ServeOptions) -> int:
    """Serve until told to stop. Returns the exit code: 0 after Ctrl-C or SIGTERM.

    Raises:
        ConfigError: before anything was started: a port in use, an unknown parser, no key.
        TokenSpeedError: the engine or the gateway did not start, or ended while serving.
    """
    _check(options)
    code: int = uvloop.run(_Supervisor(options).run())
    return code


def _check(options: ServeOptions) -> None:
    backend = options.engine.distributed_executor_backend
    if options.restart and (backend == "torchrun" or (backend is None and torchrun() is not None)):
        raise ConfigError(
            "--restart cannot start ranks that torchrun started: leave it out, and give torchrun "
            "--max-restarts"
        )
    check_exposure(options.host, options.api_key)
    check_address(options.host, options.port)
    for flag, name, known in (
        ("--tool-call-parser", options.tool_call_parser, TOOL_CALL_PARSERS),
        ("--reasoning-parser", options.reasoning_parser, REASONING_PARSERS),
    ):
        if name is not None and name not in known:
            raise ConfigError(f"{flag} must be one of {', '.join(known)}, but is {name!r}")


class _Supervisor:
    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._servicer = Servicer(token_exact_history=options.token_exact_history)
        self._server: Any = None
        self._worker_port = 0
        self._engine: EngineProcess | None = None
        self._gateway: Gateway | None = None
        self._operations: OperationsServer | None = None
        self._stopping = asyncio.Event()
        self._began_s = time.monotonic()

    async def run(self) -> int:
        """Start everything, watch it, and leave nothing behind."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        serving = asyncio.create_task(self._serve())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        finally:
            stopping.cancel()
            await self._close()
        return 0

    def _on_signal(self) -> None:
        """The first signal stops in order; the second kills."""
        if not self._stopping.is_set():
            self._stopping.set()
            return
        for pid in self._children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(130)

    def _children(self) -> list[int]:
        """Processes of ours that may still run."""
        found = []
        if self._gateway is not None and not self._gateway.exited.done():
            found.append(self._gateway.pid)
        if self._engine is not None and not self._engine.exited.done():
            found.append(self._engine.pid)
        return found

    async def _serve(self) -> None:
        self._server, self._worker_port = await start_server(self._servicer)
        if self._options.operations is not None:
            self._operations = await OperationsServer.start(
                self._servicer, self._options.operations
            )
        await self._start_engine()
        assert self._engine is not None
        info = self._engine.client.info
        self._gateway = await Gateway.launch(self._gateway_config(info))
        await self._gateway.wait_ready(model_name=info.model_name, timeout_s=_GATEWAY_TIMEOUT_S)
        if self._operations is not None:
            self._operations.connect(self._gateway.url, info)
        self._announce(info, self._gateway.url)
        await self._watch(self._gateway)

    async def _start_engine(self) -> None:
        with load_progress() as on_progress:
            self._engine = await EngineProcess.start(self._options.engine, on_progress=on_progress)
        self._servicer.attach(self._engine.client)

    async def _watch(self, gateway: Gateway) -> None:
        """Wait until something ends; an engine is started again if that was asked for."""
        restarts = 0
        while True:
            assert self._engine is not None
            began_s = time.monotonic()
            await asyncio.wait(
                {self._engine.exited, gateway.exited}, return_when=asyncio.FIRST_COMPLETED
            )
            if gateway.exited.done():
                raise EngineError(gateway.cause())
            reason = self._engine.exited.result()
            self._servicer.detach(reason)
            await self._engine.stop()
            if not self._options.restart:
                raise EngineDead(f"{reason}. Serve with --restart to have it started again.")
            if time.monotonic() - began_s > _STABLE_AFTER_S:
                restarts = 0
            restarts = await self._restart_engine(reason, restarts)

    async def _restart_engine(self, reason: str, restarts: int) -> int:
        """Start another engine, with growing pauses between attempts; how many it took so far."""
        while True:
            if restarts == _RESTARTS_IN_A_ROW_MAX:
                raise EngineDead(f"{reason}; gave up after {restarts} restarts in a row")
            pause_s = min(2.0**restarts, _BACKOFF_MAX_S)
            restarts += 1
            _log.error("%s; restart %d in %.0f s", reason, restarts, pause_s)
            await asyncio.sleep(pause_s)
            try:
                await self._start_engine()
            except TokenSpeedError as error:
                reason = f"the engine did not start: {error}"
                self._servicer.detach(reason)
                continue
            _log.warning("the engine serves again")
            return restarts

    def _gateway_config(self, info: EngineInfo) -> GatewayConfig:
        options = self._options
        return GatewayConfig(
            host=options.host,
            port=options.port,
            worker_port=self._worker_port,
            prometheus_port=unused_port(),
            tokenizer_dir=Path(info.tokenizer_dir),
            parsers=_parsers(info, options),
            api_key=options.api_key,
            log_level=_GATEWAY_LEVELS[options.log_level],
            shutdown_timeout_s=options.shutdown_timeout_s,
        )

    def _announce(self, info: EngineInfo, url: str) -> None:
        ready_s = time.monotonic() - self._began_s
        print(f"TokenSpeed serves {info.model_name} at {url}/v1 (ready in {ready_s:.1f} s)")
        if self._operations is not None:
            print(f"operations: {self._operations.url}")
        if (line := _floor_line(info)) is not None:
            print(line)
        wanted = self._options.curl
        if sys.stdout.isatty() if wanted is None else wanted:
            key = self._options.api_key is not None
            print(_curl(info.model_name, url, with_key=key))
        sys.stdout.flush()

    async def _close(self) -> None:
        """End every process, clients of running requests first: they are to hear of it.

        The gateway goes on listening for seconds, so that whoever routes to it sees it unready
        first; what it still lets in is refused.
        """
        self._servicer.draining = self._servicer.ending = True
        if self._gateway is not None:
            await self._gateway.stop(is_idle=lambda: self._servicer.running == 0)
        if self._operations is not None:
            await self._operations.stop()
        if self._engine is not None:
            await self._engine.stop()
        if self._server is not None:
            await self._server.stop(grace=0.5)


def _parsers(info: EngineInfo, options: ServeOptions) -> Parsers:
    folder = Path(info.tokenizer_dir)
    template = read_template(folder)
    prompt = _generation_prompt(folder, template)
    chosen = choose_parsers(template, prompt, model_type=info.model_type)
    if options.tool_call_parser is None and lacks_tool_parser(template, chosen):
        _log.warning(
            "the chat template offers tools, but no parser fits it: tool calls will come as text. "
            "Choose a --tool-call-parser."
        )
    return replace(
        chosen,
        tool_call=options.tool_call_parser or chosen.tool_call,
        reasoning=options.reasoning_parser or chosen.reasoning,
    )


def _generation_prompt(folder: Path, template: str | None) -> str:
    """What the template puts before an answer; "" where it cannot be rendered."""
    if template is None:
        return ""
    try:
        return loader.Tokenizer(folder).render_chat([{"role": "user", "content": "hello"}])
    except TokenSpeedError as error:
        _log.warning("the chat template cannot be rendered: %s", error)
        return ""


def _floor_line(info: EngineInfo) -> str | None:
    """What the engine promises each user; None where it promises nothing."""
    if info.tps_floor is None or info.tps_alone is None:
        return None
    held = min(info.tps_floor, 0.9 * info.tps_alone)
    alone = f"one user alone gets about {info.tps_alone:.0f} tokens/s here"
    if held < info.tps_floor:
        return f"{alone}, too few for --tps-floor {info.tps_floor:g}: holding 90%, {held:.0f}"
    return f"{alone}; every user keeps {info.tps_floor:g} (--tps-floor)"


def _curl(model_name: str, url: str, *, with_key: bool) -> str:
    body = {"model": model_name, "messages": [{"role": "user", "content": "Hello!"}]}
    key = " -H 'authorization: Bearer '\"$TOKENSPEED_API_KEY\"" if with_key else ""
    return (
        f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key} "
        f"-d '{json.dumps(body)}'"
    )
