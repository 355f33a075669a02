"""`tokenspeed bench replay` and `compare`: how fast a running server is for coding agents."""

import asyncio
import enum
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokenspeed import __version__
from tokenspeed.cli.options import LogLevel, LogLevelOption
from tokenspeed.cli.reporting import fail, reported
from tokenspeed.core.errors import ConfigError

if TYPE_CHECKING:
    from tokenspeed.bench import live
    from tokenspeed.bench.sessions import Workload

__all__ = [
    "SyntheticName",
    "compare_command",
    "parse_counts",
    "replay_command",
    "sessions_of",
]

_DRAWN_SESSIONS = 16


class SyntheticName(enum.StrEnum):
    """Statistics to draw sessions from."""

    SWE = "swe"


def replay_command(
    *,
    url: Annotated[str, typer.Argument(help="Of an OpenAI-compatible server.")],
    sessions: Annotated[
        Path | None,
        typer.Option(
            help="A file of sessions (messages, abench, swe_smith) or a Mooncake trace, whose "
            "requests are sent at their times unless --concurrency is given."
        ),
    ] = None,
    synthetic: Annotated[
        SyntheticName | None, typer.Option(help="Draw sessions in place of a file.")
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Users at once, a run with each [default: 1,2,4,8]."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs with each number of users.")] = 1,
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds of a run; sessions begin anew [default: each session once]."),
    ] = None,
    sessions_max: Annotated[
        int | None,
        typer.Option(min=1, help="Sessions of a run [default: the file's, or 16 drawn ones]."),
    ] = None,
    turns_max: Annotated[
        int | None,
        typer.Option(min=1, help="Turns of a session [default: all]."),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(min=1, help="End a session before about so many tokens [default: no end]."),
    ] = None,
    output_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of each answer [default: as recorded]."),
    ] = None,
    tool_gap_scale: Annotated[
        float, typer.Option(min=0.0, help="Factor on the tools' times; 0 removes them.")
    ] = 1.0,
    tool_gap_max: Annotated[
        float | None,
        typer.Option(min=0.0, help="Longest time of a tool in seconds."),
    ] = None,
    speed: Annotated[
        float, typer.Option(help="How many times faster than recorded a trace's requests come.")
    ] = 1.0,
    model: Annotated[
        str | None, typer.Option(help="Name to ask for [default: the server's first].")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TOKENSPEED_API_KEY", help="Key of the server.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds without a byte after which an answer failed.")
    ] = 600.0,
    errors_max: Annotated[
        int, typer.Option(help="Failed answers in a row that end the measurement.")
    ] = 10,
    pid: Annotated[
        list[int] | None,
        typer.Option(
            help="A process of the server, whose CPU time and memory, with its children's, are "
            "measured; repeatable [default: found by the port, on loopback]."
        ),
    ] = None,
    tps_floor: Annotated[
        float, typer.Option(min=0.0, help="TPS of a good answer; 0 for no goodput.")
    ] = 70.0,
    ttft_limit: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds to a good answer's first token.")
    ] = None,
    salt: Annotated[
        str | None,
        typer.Option(
            help="Text at the head of each session; the same one twice finds the cache of the "
            "first time, and so does an empty one, which adds none [default: something new for "
            "each run]."
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Name in reports [default: the URL].")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn sessions.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A folder for report.json, frontier.png and report.html. It keeps each run as it "
            "ends: the same command goes on where it was broken off."
        ),
    ] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Replay agents' sessions against a server: TPS of a user, TPM, first tokens, cache."""
    with reported(log_level):
        from tokenspeed.bench import check_plotting, live  # noqa: PLC0415
        from tokenspeed.bench.sessions import cut  # noqa: PLC0415

        if output is not None:
            # Before the work, not after it.
            check_plotting()
        workload = sessions_of(sessions, synthetic, sessions_max, seed)
        levels: tuple[int | None, ...]
        if concurrency is not None:
            levels = parse_counts("--concurrency", concurrency)
        else:
            levels = (None,) if workload.has_arrivals else (1, 2, 4, 8)
        workload = cut(
            workload,
            turns_max=turns_max,
            context_max=max_context,
            output_tokens=output_tokens,
            gap_scale=tool_gap_scale,
            gap_max_s=tool_gap_max,
        )
        asked = live.Sweep(
            levels=levels,
            repeats=repeats,
            each=live.Pass(
                users=levels[0],
                duration_s=duration,
                speed=speed,
                errors_max=errors_max,
                salt=salt,
            ),
            pids=tuple(pid) if pid else _found(url),
        )
        settings = {
            "duration": "each session once" if duration is None else f"{duration:g} s",
            "speed": f"{speed:g}",
            "floor": f"{tps_floor:g} TPS" if tps_floor else "none",
            "TTFT limit": "none" if ttft_limit is None else f"{ttft_limit:g} s",
            "salt": "new" if salt is None else salt,
        }
        summarised = {"floor_tps": tps_floor or None, "ttft_max_s": ttft_limit}
        report = asyncio.run(
            _measure(
                url,
                workload,
                asked,
                model=model,
                api_key=api_key,
                timeout_s=timeout,
                label=label or url,
                settings=settings,
                output=output,
                summarised=summarised,
            )
        )
        if output is not None:
            (output / "report.json").write_bytes(report.to_json())
            live.write_page([report], output, title=f"{report.plan.model}, {workload.source}")
        _show(report, as_json=as_json)
        if report.incomplete is not None:
            fail(report.incomplete)
        if all(run.errors == run.answers for run in report.runs):
            fail("no answer was whole; the errors are in the report")


async def _measure(
    url: str,
    workload: "Workload",
    asked: "live.Sweep",
    *,
    model: str | None,
    api_key: str | None,
    timeout_s: float,
    label: str,
    settings: dict[str, str],
    output: Path | None,
    summarised: dict[str, float | None],
) -> "live.ReplayReport":
    from tokenspeed.bench import live  # noqa: PLC0415
    from tokenspeed.cli.bench_live import LiveFigures  # noqa: PLC0415

    began_at = time.time()
    async with live.ChatClient(url, model=model, api_key=api_key, timeout_s=timeout_s) as client:
        plan = live.SweepPlan(
            label=label,
            url=client.url,
            model=await client.find_model(),
            workload=workload.source,
            workload_digest=live.digest(workload),
            sessions=len(workload.sessions),
            turns=workload.turns,
            concurrency=tuple(users for users in asked.levels if users is not None),
            repeats=asked.repeats,
            settings=settings,
        )
        store = None if output is None else live.RunStore(output, plan)
        with LiveFigures(runs=len(asked.passes()), turns=workload.turns) as figures:
            runs = await live.sweep(client, workload, asked, store=store, watcher=figures)
        return live.report_of(
            plan,
            [live.summarise_run(run, **summarised) for run in runs],
            version=__version__,
            machine=live.machine(),
            began_at=began_at,
            forced_lengths=client.forces_lengths,
            incomplete=live.missing(asked, runs),
        )


def compare_command(
    *,
    first: Annotated[Path, typer.Argument(help="report.json of a replay.")],
    second: Annotated[Path, typer.Argument(help="report.json of another one of the same work.")],
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Compare two replays run by run: the second's figures over the first's."""
    with reported(log_level):
        from tokenspeed.bench import live  # noqa: PLC0415
        from tokenspeed.cli.bench_live import comparison_table  # noqa: PLC0415

        before, after = live.read_report(first), live.read_report(second)
        found = live.compare(before, after)
        Console().print(comparison_table(found, before.plan.label, after.plan.label))


def parse_counts(flag: str, text: str) -> tuple[int, ...]:
    """Numbers with commas or spaces between them, each once, in the order given.

    Raises:
        ConfigError: something else.
    """
    try:
        counts = [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ConfigError(f"{flag} {text!r} must be numbers from 1 on, such as 1,2,4,8")
    return tuple(dict.fromkeys(counts))


def sessions_of(
    sessions: Path | None, synthetic: SyntheticName | None, sessions_max: int | None, seed: int
) -> "Workload":
    """What is replayed, before it is cut.

    Raises:
        ConfigError: neither a file nor a draw is asked for, or both.
        WorkloadError: the file cannot be read.
    """
    from tokenspeed.bench.sessions import SWE, generate_sessions, read_sessions  # noqa: PLC0415

    if (sessions is None) == (synthetic is None):
        raise ConfigError("replay takes either --sessions FILE or --synthetic swe")
    if sessions is not None:
        return read_sessions(sessions, limit=sessions_max)
    count = _DRAWN_SESSIONS if sessions_max is None else sessions_max
    return generate_sessions(SWE, count=count, seed=seed)


def _found(url: str) -> tuple[int, ...]:
    from tokenspeed.bench.live import find_server  # noqa: PLC0415

    found = find_server(url)
    return () if found is None else (found,)


def _show(report: "live.ReplayReport", *, as_json: bool) -> None:
    from tokenspeed.cli.bench_live import replay_table  # noqa: PLC0415

    if as_json:
        typer.echo(report.to_json())
    else:
        Console().print(replay_table(report))
