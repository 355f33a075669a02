"""`tokenspeed top`: a server's sessions, speeds and cache, live in the terminal."""

import json
import time
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.live import Live

from tokenspeed.cli.reporting import reported
from tokenspeed.cli.top_view import frame
from tokenspeed.core.errors import ConfigError, MeasurementError

__all__ = ["top"]

_TIMEOUT_S = 10.0


def top(
    *,
    operations: Annotated[
        str,
        typer.Option(
            help="The server's operations port, as it prints it: a URL, or unix:PATH.",
        ),
    ] = "http://127.0.0.1:8001",
    api_key: Annotated[
        str | None, typer.Option(envvar="TOKENSPEED_API_KEY", help="The server's key.")
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.1, max=60.0, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and end.")] = False,
) -> None:
    """Watch a running server: sessions, their speed, the cache."""
    with reported(), _client(operations, api_key) as client:
        console = Console()
        view = frame(**_look(client, operations), width=console.width)
        if once:
            console.print(view)
            return
        with Live(view, console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(frame(**_look(client, operations), width=console.width), refresh=True)


def _client(operations: str, api_key: str | None) -> httpx.Client:
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    if operations.startswith("unix:"):
        transport = httpx.HTTPTransport(uds=operations.removeprefix("unix:"))
        return httpx.Client(
            transport=transport, base_url="http://localhost", headers=headers, timeout=_TIMEOUT_S
        )
    if not operations.startswith(("http://", "https://")):
        raise ConfigError(
            f"--operations must be a URL or unix:PATH, as the server prints it, "
            f"but is {operations!r}"
        )
    # A proxy of the environment has no way to this machine's loopback.
    return httpx.Client(base_url=operations, headers=headers, timeout=_TIMEOUT_S, trust_env=False)


def _look(client: httpx.Client, operations: str) -> dict[str, Any]:
    """What the port tells now: status, sessions, and the cache where there is an engine."""
    status = _get(client, "/status", operations)
    cache = _get(client, "/cache", operations) if status["stats"] is not None else None
    return {"status": status, "sessions": _get(client, "/sessions", operations), "cache": cache}


def _get(client: httpx.Client, path: str, operations: str) -> Any:
    try:
        answer = client.get(path)
        if answer.status_code == 401:
            raise MeasurementError(
                f"the operations port {operations} wants the server's key: give --api-key"
            )
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, json.JSONDecodeError) as error:
        raise MeasurementError(
            f"no operations port answers at {operations} ({error}). Give --operations what "
            "`tokenspeed serve` prints behind `operations:`; it has none with --operations-port 0."
        ) from None
