"""`tokenspeed bench`: what the engine would do, and what it did."""

import dataclasses
import enum
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenspeed.cli.bench_offline import offline_command
from tokenspeed.cli.bench_peers import peers_command
from tokenspeed.cli.bench_replay import compare_command, replay_command
from tokenspeed.cli.bench_tables import floor_table, oversubscription_table, report_table
from tokenspeed.cli.options import LogLevel, LogLevelOption
from tokenspeed.cli.reporting import reported
from tokenspeed.core.errors import ConfigError

if TYPE_CHECKING:
    from tokenspeed.bench.hardware import Hardware, StepTime

__all__ = ["bench_app"]

bench_app = typer.Typer(help="Measure and simulate.", no_args_is_help=True, rich_markup_mode=None)

_log = logging.getLogger(__name__)


class Loop(enum.StrEnum):
    """When requests are sent."""

    OPEN = "open"
    CLOSED = "closed"


class RouterName(enum.StrEnum):
    """How a replica is chosen."""

    CACHE_AWARE = "cache-aware"
    LEAST_LOADED = "least-loaded"
    ROUND_ROBIN = "round-robin"


class ExperimentName(enum.StrEnum):
    """A load that no trace gives."""

    FLOOR = "floor"
    OVERSUBSCRIPTION = "oversubscription"


@bench_app.callback()
def _bench() -> None:
    """Measure and simulate."""


bench_app.command("replay")(replay_command)
bench_app.command("compare")(compare_command)
bench_app.command("peers")(peers_command)
bench_app.command("offline")(offline_command)


@bench_app.command("simulate")
def simulate_command(
    *,
    trace: Annotated[
        Path | None, typer.Argument(help="A trace in Mooncake's fields, JSON lines.")
    ] = None,
    experiment: Annotated[
        ExperimentName | None,
        typer.Option(help="A synthetic load on one replica, in place of a trace."),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Step times and memory of a replica: h200-32b, h200x4-32b or cpu2-135m "
            "[default: h200-32b, for the floor's experiment h200x4-32b]."
        ),
    ] = None,
    step_time: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=US",
            help="A cost of the step-time model in microseconds, instead of the preset's: step, "
            "weights, prefill_token, decode_row, kv_token or pair; repeatable.",
        ),
    ] = None,
    jitter: Annotated[
        float, typer.Option(help="Spread of a random factor on step times, as 0.05.")
    ] = 0.0,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the KV pool [default: the preset's].")
    ] = None,
    page_size: Annotated[int, typer.Option(min=1, help="Token positions of one KV page.")] = 32,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 64,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step.")] = 2048,
    max_context: Annotated[
        int, typer.Option(min=1, help="Tokens of one request and its answer.")
    ] = 131072,
    overlap_depth: Annotated[int, typer.Option(min=0, max=1, help="Steps planned ahead.")] = 1,
    replicas: Annotated[int, typer.Option(help="Engines that serve.")] = 1,
    group_replicas: Annotated[
        int, typer.Option(help="Engines behind one router; groups share no load.")
    ] = 16,
    router: Annotated[
        RouterName, typer.Option(help="How a replica is chosen.")
    ] = RouterName.CACHE_AWARE,
    load_bound: Annotated[
        float,
        typer.Option(help="Most load of a replica, as a multiple of the mean (cache-aware)."),
    ] = 1.5,
    scale: Annotated[
        int, typer.Option(help="Copies of the trace, each with its own salt and shift in time.")
    ] = 1,
    speed: Annotated[
        float, typer.Option(help="How many times faster than recorded requests come.")
    ] = 1.0,
    loop: Annotated[
        Loop,
        typer.Option(help="Send at the recorded times, or a turn only after the one before it."),
    ] = Loop.OPEN,
    tool_gap_ms: Annotated[
        float | None,
        typer.Option(help="Between two turns of a closed loop [default: as recorded]."),
    ] = None,
    recorded_token_ms: Annotated[
        float,
        typer.Option(help="The recorded provider's time for a token, taken off recorded gaps."),
    ] = 20.0,
    tps_floor: Annotated[
        float, typer.Option(min=0, help="TPS that each admitted user is to get; 0 for no floor.")
    ] = 70.0,
    keep_floor: Annotated[
        bool,
        typer.Option(
            "--keep-floor/--ignore-floor",
            help="Have the scheduler keep the floor, or only count what falls below it.",
        ),
    ] = True,
    queue_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds after which a waiting request is refused [default: never]."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take only the trace's first so many requests.")
    ] = None,
    optimum: Annotated[
        bool | None,
        typer.Option(
            "--optimum/--no-optimum",
            help="Put plain LRU's and Belady's hit rates beside it [default: with one copy].",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; groups are shared out.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of shifts in time and of jitter.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, not as a table.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="A folder to write report.json and plots into.")
    ] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Drive the real scheduler over a trace in virtual time, with step times instead of a GPU."""
    with reported(log_level):
        from tokenspeed import bench  # noqa: PLC0415
        from tokenspeed.core.config import CacheGroup, SchedulerConfig  # noqa: PLC0415

        # Four devices: one alone gives eight users of that context little more than the floor.
        usual = "h200x4-32b" if experiment is ExperimentName.FLOOR else "h200-32b"
        chosen = _hardware(usual if hardware is None else hardware)
        config = bench.SimulationConfig(
            step_time=_step_time(chosen.step_time, step_time or []),
            jitter=jitter,
            scheduler=SchedulerConfig(
                groups=(
                    CacheGroup(
                        pages=(chosen.kv_tokens if kv_tokens is None else kv_tokens) // page_size
                    ),
                ),
                page_size=page_size,
                slots_max=max_running,
                step_tokens_max=max_step_tokens,
                context_max=max_context,
                overlap_depth=overlap_depth,
                tps_floor=(tps_floor or None) if keep_floor else None,
                queue_timeout_us=None if queue_timeout is None else _microseconds(queue_timeout),
            ),
            replicas=replicas,
            group_replicas=group_replicas,
            router=router.value,
            load_bound=load_bound,
            scale=scale,
            speed=speed,
            loop=loop.value,
            tool_gap_ms=tool_gap_ms,
            recorded_token_ms=recorded_token_ms,
            floor_tps=tps_floor or None,
            seed=seed,
        )
        if (trace is None) == (experiment is None):
            raise ConfigError("simulate takes either a TRACE or an --experiment")
        folder = None if output is None else _folder(output)
        if experiment is ExperimentName.FLOOR:
            if not tps_floor:
                raise ConfigError("--experiment floor needs a --tps-floor above 0")
            floor = bench.floor(config, tps_floor=tps_floor)
            _show(floor.to_json(), floor_table(floor), as_json=as_json, folder=folder)
            return
        if trace is None:
            crowd = bench.oversubscription(config, devices_per_replica=chosen.devices)
            _show(crowd.to_json(), oversubscription_table(crowd), as_json=as_json, folder=folder)
            return
        began_s = time.monotonic()
        results = bench.simulate_file(trace, config, limit=limit, jobs=jobs)
        spent_s = time.monotonic() - began_s
        read = bench.read_trace(trace, limit=limit)
        beside = None
        if scale == 1 if optimum is None else optimum:
            beside = bench.find_baselines(
                read, results, pages=config.scheduler.groups[0].pages, page_size=page_size
            )
        summary = bench.summarise(
            results,
            config,
            trace_name=read.name,
            devices_per_replica=chosen.devices,
            baselines=beside,
        )
        if folder is not None:
            bench.draw(summary, results, folder)
        _show(summary.to_json(), report_table(summary), as_json=as_json, folder=folder)
        _log.info("%.0f s of %d replicas in %.1f s", summary.duration_s, replicas, spent_s)


def _show(report: bytes, table: Table, *, as_json: bool, folder: Path | None) -> None:
    """Print a report, and keep it if there is a folder for it."""
    if folder is not None:
        (folder / "report.json").write_bytes(report)
    if as_json:
        typer.echo(report)
    else:
        Console().print(table)


def _hardware(name: str) -> "Hardware":
    from tokenspeed.bench import HARDWARE  # noqa: PLC0415

    if name not in HARDWARE:
        raise ConfigError(f"--hardware must be one of {', '.join(HARDWARE)}, but is {name!r}")
    return HARDWARE[name]


def _step_time(preset: "StepTime", changes: list[str]) -> "StepTime":
    names = [field.name.removesuffix("_us") for field in dataclasses.fields(preset)]
    values: dict[str, float] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = None
        if name not in names or not equals or value is None:
            raise ConfigError(
                f"--step-time {change!r} must be NAME=US, such as step=1000; "
                f"names are {', '.join(names)}"
            )
        values[f"{name}_us"] = value
    return dataclasses.replace(preset, **values)


def _microseconds(seconds: float) -> int:
    if not 0 < seconds <= 1e9:
        raise ConfigError(f"--queue-timeout must be seconds in (0, 1e9], but is {seconds}")
    return round(seconds * 1e6)


def _folder(path: Path) -> Path:
    from tokenspeed.bench import check_plotting  # noqa: PLC0415

    # Before the work, not after it.
    check_plotting()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {path} is no folder to write: {error.strerror}") from error
    return path
