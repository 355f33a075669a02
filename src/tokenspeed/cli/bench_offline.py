"""`tokenspeed bench offline`: the engine alone, in this process."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenspeed import __version__, loader
from tokenspeed.cli.bench_replay import parse_counts
from tokenspeed.cli.options import DEFAULT_MODEL, LogLevel, LogLevelOption, takes_engine_flags
from tokenspeed.cli.reporting import reported
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import let_threads_sleep
from tokenspeed.core.errors import ConfigError

if TYPE_CHECKING:
    from tokenspeed.bench.offline import OfflineReport

__all__ = ["offline_command"]

_log = logging.getLogger(__name__)


@takes_engine_flags
def offline_command(
    *,
    engine: Callable[[str], EngineConfig],
    model: Annotated[
        str, typer.Argument(help="Catalogue name, pypi:NAME, hub id ORG/NAME, or a path.")
    ] = DEFAULT_MODEL,
    prefill: Annotated[
        str, typer.Option(metavar="N,N,...", help="Lengths of prompts; empty for none.")
    ] = "512,2048",
    decode: Annotated[
        str, typer.Option(metavar="N,N,...", help="Depths of one user's decoding; empty for none.")
    ] = "16,4096",
    batch: Annotated[
        str, typer.Option(metavar="N,N,...", help="Users that decode together; empty for none.")
    ] = "1,2,4,8",
    batch_depth: Annotated[int, typer.Option(min=1, help="Tokens before each of them.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each decoded answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Of everything, after one to warm up.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="A file for the report as JSON.")] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Measure prefill, decoding and batches without a server; the prefix cache is off."""
    with reported(log_level):
        let_threads_sleep()
        from tokenspeed.bench import live, offline  # noqa: PLC0415

        if output is not None and not output.parent.is_dir():
            # Told before hours of measuring, not behind them.
            raise ConfigError(f"--output {output} needs the folder {output.parent}: make it first")
        plan = offline.OfflinePlan(
            prefill=_counts("--prefill", prefill),
            decode=_counts("--decode", decode),
            batch=_counts("--batch", batch),
            batch_depth=batch_depth,
            new_tokens=new_tokens,
            repeats=repeats,
        )
        config = plan.configure(engine(model))
        # Only now, because it imports torch.
        build_engine = importlib.import_module("tokenspeed.engine.build").build_engine
        with loader.terminal_progress() as shown:
            built = build_engine(config, progress=shown)
        report = offline.OfflineReport(
            version=__version__,
            machine=live.machine(),
            model=model,
            plan=plan,
            rows=offline.measure_offline(built.core, plan, watch=_log.info),
        )
        if output is not None:
            try:
                output.write_bytes(report.to_json())
            except OSError as error:
                raise ConfigError(
                    f"--output {output} cannot be written: {error.strerror}"
                ) from error
        if as_json:
            typer.echo(report.to_json())
        else:
            Console().print(_table(report))


def _counts(flag: str, text: str) -> tuple[int, ...]:
    return parse_counts(flag, text) if text.strip() else ()


def _table(report: "OfflineReport") -> Table:
    table = Table(box=None, pad_edge=False, title=report.model, title_justify="left")
    table.add_column("work", no_wrap=True)
    for name in ("tokens", "users", "tokens a second", "95%"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        rate = row.tokens_per_s
        table.add_row(
            row.work,
            f"{row.tokens:,}",
            str(row.users),
            f"{rate.mean:,.1f}",
            "" if rate.high is None else f"±{rate.high - rate.mean:,.1f}",
        )
    return table
