"""`tokenspeed serve`: the engine behind an OpenAI- and Anthropic-compatible API."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tokenspeed.cli.options import DEFAULT_MODEL, LogLevel, LogLevelOption, takes_engine_flags
from tokenspeed.cli.reporting import reported
from tokenspeed.core.config import STREAM_INTERVAL_MS, EngineConfig
from tokenspeed.core.environment import quiet_grpc_forks, torchrun

__all__ = ["serve"]


@takes_engine_flags
def serve(
    *,
    engine: Callable[[str], EngineConfig],
    model: Annotated[
        str, typer.Argument(help="Catalogue name, pypi:NAME, hub id ORG/NAME, or a path.")
    ] = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to serve on; beyond loopback only with --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TOKENSPEED_API_KEY",
            help="Key that clients must send as `Authorization: Bearer KEY`.",
        ),
    ] = None,
    dp: Annotated[
        int, typer.Option(min=1, help="Engines side by side, each with its own ranks and cache.")
    ] = 1,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="Reads tool calls [default: by the chat template].")
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="Reads reasoning [default: by the chat template].")
    ] = None,
    tps_floor: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Tokens a second that every admitted user gets, or 90% of what one user alone "
            "would; 0 turns it off.",
        ),
    ] = 70.0,
    queue_timeout: Annotated[
        float,
        typer.Option(
            min=0.0, help="Seconds to wait for a turn before a 429 says when to retry; 0 waits on."
        ),
    ] = 60.0,
    token_exact_history: Annotated[
        bool,
        typer.Option(
            "--token-exact-history/--no-token-exact-history",
            help="Serve what comes back of a conversation as the tokens it was served as.",
        ),
    ] = True,
    stream_interval: Annotated[
        int,
        typer.Option(
            min=0,
            max=10_000,
            help="Milliseconds that tokens wait at most to share a message while 20 streams or "
            "more run, with fewer so much less, and a quarter of it as an answer begins; 0 sends "
            "each at once, more saves CPU time.",
        ),
    ] = STREAM_INTERVAL_MS,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start the engine again when it dies.")
    ] = False,
    curl: Annotated[
        bool | None,
        typer.Option(
            "--curl/--no-curl", help="Print a curl to try when ready [default: on a terminal]."
        ),
    ] = None,
    shutdown_timeout: Annotated[
        int, typer.Option(min=0, max=3600, help="Seconds that running requests may take to end.")
    ] = 10,
    operations_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of metrics, health, sessions and the dashboard; 0 for none [default: the "
            "one after --port, or any that is free].",
        ),
    ] = None,
    operations_host: Annotated[
        str, typer.Option(help="Its address; beyond loopback only with --api-key.")
    ] = "127.0.0.1",
    operations_socket: Annotated[
        Path | None, typer.Option(help="A Unix socket instead, for you alone.")
    ] = None,
    health_timeout: Annotated[
        float,
        typer.Option(help="Seconds of waiting work and no step after which /health says 503."),
    ] = 30.0,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(help="Where to send OpenTelemetry spans of requests [default: nowhere]."),
    ] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Serve a model over HTTP until Ctrl-C."""
    with reported(log_level):
        config = replace(
            engine(model),
            dp=dp,
            tps_floor=tps_floor or None,
            queue_timeout_s=queue_timeout or None,
            stream_interval_ms=stream_interval,
        )
        if _follows_rank_0(config):
            # Imported late: the torch behind it takes seconds, and rank 0's server needs none.
            from tokenspeed.engine.follower import follow_by_torchrun  # noqa: PLC0415

            follow_by_torchrun(config)
            return
        quiet_grpc_forks()
        # Imported late: gRPC and the gateway's messages take a while, and `--help` should not.
        from tokenspeed.cli.supervisor import ServeOptions, supervise  # noqa: PLC0415
        from tokenspeed.entrypoint.operations.server import OperationsConfig  # noqa: PLC0415

        operations = None
        if operations_port != 0 or operations_socket is not None:
            operations = OperationsConfig(
                host=operations_host,
                port=operations_port or None,
                near_port=min(port + 1, 65535),
                socket_path=operations_socket,
                api_key=api_key,
                health_timeout_s=health_timeout,
                otlp_endpoint=otlp_endpoint,
            )
        options = ServeOptions(
            engine=config,
            host=host,
            port=port,
            api_key=api_key,
            tool_call_parser=tool_call_parser,
            reasoning_parser=reasoning_parser,
            token_exact_history=token_exact_history,
            restart=restart,
            curl=curl,
            shutdown_timeout_s=shutdown_timeout,
            log_level=log_level.value,
            operations=operations,
        )
        code = supervise(options)
        if code:
            raise typer.Exit(code)


def _follows_rank_0(config: EngineConfig) -> bool:
    """Whether torchrun started this process as a rank above 0, which serves nothing itself."""
    found = torchrun()
    within = config.distributed_executor_backend in (None, "torchrun")
    return within and found is not None and found.rank > 0
