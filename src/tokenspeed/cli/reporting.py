"""How commands end: one clear line for an error of ours, and an exit code."""

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import typer

from tokenspeed.cli.options import LogLevel
from tokenspeed.core.errors import TokenSpeedError

__all__ = ["ended_like_interrupted", "fail", "reported"]

INTERRUPTED = 130


@contextlib.contextmanager
def reported(log_level: LogLevel = LogLevel.INFO) -> Iterator[None]:
    """Turn a TokenSpeedError into a line on stderr and exit code 1, Ctrl-C into 130.

    With the log level "debug" the error's traceback is shown instead.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if log_level is not LogLevel.DEBUG:
        # A line for each request that a replay sends.
        logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        yield
    except TokenSpeedError as error:
        if log_level is LogLevel.DEBUG:
            raise
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@contextlib.contextmanager
def ended_like_interrupted() -> Iterator[None]:
    """Have SIGTERM do what Ctrl-C does, so that servers we started are stopped first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fail(message: str) -> None:
    """Print an error and end the command with exit code 1."""
    typer.echo(f"tokenspeed: error: {message}", err=True)
    raise typer.Exit(1)
