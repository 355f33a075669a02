"""Keeps an engine, the servicer and the gateway together: all serve, or none is left."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop

from tokenspeed import loader
from tokenspeed.cli.progress import load_progress
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import torchrun
from tokenspeed.core.errors import ConfigError, EngineDead, EngineError, TokenSpeedError
from tokenspeed.engine.client import ProgressCallback
from tokenspeed.engine.crowd import check_crowd
from tokenspeed.engine.facts import EngineInfo
from tokenspeed.engine.process import EngineProcess
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
    if options.engine.dp > 1 and backend is None and torchrun() is not None:
        # The configuration says why.
        replace(options.engine, distributed_executor_backend="torchrun")
    # Each engine would find out by itself, but only after all of them were started.
    starts_ranks = backend == "mp" or (backend is None and torchrun() is None)
    check_crowd(options.engine, ranks=options.engine.tp * options.engine.cp if starts_ranks else 1)
    check_exposure(options.host, options.api_key)
    check_address(options.host, options.port)
    for flag, name, known in (
        ("--tool-call-parser", options.tool_call_parser, TOOL_CALL_PARSERS),
        ("--reasoning-parser", options.reasoning_parser, REASONING_PARSERS),
    ):
        if name is not None and name not in known:
            raise ConfigError(f"{flag} must be one of {', '.join(known)}, but is {name!r}")


class _Replica:
    """One engine and its servicer.

    Args:
        config: the engine's; `dp_rank` says which one it is.
        servicer: serves it.

    Attributes:
        server, port: of the servicer, once it listens.
        engine: the process, when there is one.
    """

    def __init__(self, config: EngineConfig, servicer: Servicer) -> None:
        self.servicer = servicer
        self.server: Any = None
        self.port = 0
        self.engine: EngineProcess | None = None
        self._config = config

    async def start(self, on_progress: ProgressCallback | None) -> None:
        """Start the engine and serve it.

        Raises:
            TokenSpeedError: it does not start.
        """
        self.engine = await EngineProcess.start(self._config, on_progress=on_progress)
        self.servicer.attach(self.engine.client)

    async def keep(self, *, restart: bool) -> None:
        """Wait until the engine ends; it is started again if that was asked for.

        Raises:
            EngineDead: it ended, and is not started again.
        """
        restarts = 0
        while True:
            assert self.engine is not None
            began_s = time.monotonic()
            reason = self._named(await asyncio.shield(self.engine.exited))
            self.servicer.detach(reason)
            await self.engine.stop()
            if not restart:
                raise EngineDead(f"{reason}. Serve with --restart to have it started again.")
            if time.monotonic() - began_s > _STABLE_AFTER_S:
                restarts = 0
            restarts = await self._restart(reason, restarts)

    async def stop(self) -> None:
        """End both."""
        if self.engine is not None:
            await self.engine.stop()
        if self.server is not None:
            await self.server.stop(grace=0.5)

    async def _restart(self, reason: str, restarts: int) -> int:
        """Start another engine, with growing pauses between attempts; how many it took so far."""
        while True:
            if restarts == _RESTARTS_IN_A_ROW_MAX:
                raise EngineDead(f"{reason}; gave up after {restarts} restarts in a row")
            pause_s = min(2.0**restarts, _BACKOFF_MAX_S)
            restarts += 1
            _log.error("%s; restart %d in %.0f s", reason, restarts, pause_s)
            await asyncio.sleep(pause_s)
            try:
                with load_progress() as on_progress:
                    await self.start(on_progress)
            except TokenSpeedError as error:
                reason = self._named(f"the engine did not start: {error}")
                self.servicer.detach(reason)
                continue
            _log.warning("%s", self._named("the engine serves again"))
            return restarts

    def _named(self, text: str) -> str:
        if self._config.dp == 1:
            return text
        return f"engine {self._config.dp_rank} of {self._config.dp}: {text}"


class _Supervisor:
    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        first = Servicer(
            token_exact_history=options.token_exact_history,
            stream_interval_s=options.engine.stream_interval_ms / 1000,
        )
        self._replicas = [
            _Replica(
                replace(options.engine, dp_rank=rank),
                first
                if rank == 0
                else Servicer(token_exact_history=options.token_exact_history, beside=first),
            )
            for rank in range(options.engine.dp)
        ]
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
        for replica in self._replicas:
            if replica.engine is not None and not replica.engine.exited.done():
                found.append(replica.engine.pid)
        return found

    async def _serve(self) -> None:
        servicers = [replica.servicer for replica in self._replicas]
        for replica in self._replicas:
            replica.server, replica.port = await start_server(replica.servicer)
        if self._options.operations is not None:
            self._operations = await OperationsServer.start(servicers, self._options.operations)
        with load_progress() as on_progress:
            await _together(
                replica.start(on_progress if number == 0 else None)
                for number, replica in enumerate(self._replicas)
            )
        assert self._replicas[0].engine is not None
        info = self._replicas[0].engine.client.info
        self._gateway = await Gateway.launch(self._gateway_config(info))
        await self._gateway.wait_ready(model_name=info.model_name, timeout_s=_GATEWAY_TIMEOUT_S)
        if self._operations is not None:
            self._operations.connect(self._gateway.url, info)
        self._announce(info, self._gateway.url)
        await _together(
            (
                self._watch(self._gateway),
                *(replica.keep(restart=self._options.restart) for replica in self._replicas),
            )
        )

    async def _watch(self, gateway: Gateway) -> None:
        """Wait until the gateway ends, which nothing outlives."""
        # Whoever ends the watch is not to end the gateway's: running requests get their time.
        await asyncio.shield(gateway.exited)
        raise EngineError(gateway.cause())

    def _gateway_config(self, info: EngineInfo) -> GatewayConfig:
        options = self._options
        return GatewayConfig(
            host=options.host,
            port=options.port,
            worker_ports=tuple(replica.port for replica in self._replicas),
            page_size=info.page_size,
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
        servicer = self._replicas[0].servicer
        servicer.draining = servicer.ending = True
        if self._gateway is not None:
            await self._gateway.stop(is_idle=lambda: servicer.running == 0)
        if self._operations is not None:
            await self._operations.stop()
        await asyncio.gather(*(replica.stop() for replica in self._replicas))


async def _together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do some things at once; the first that fails ends the others, and is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled():
            task.result()


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
