"""`tokenspeed bench peers`: our engine beside others on the same model and sessions."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tokenspeed.cli.bench_replay import SyntheticName, parse_counts, sessions_of
from tokenspeed.cli.options import LogLevel, LogLevelOption
from tokenspeed.cli.reporting import ended_like_interrupted, fail, reported
from tokenspeed.core.errors import WorkloadError

__all__ = ["peers_command"]

_ENGINES = "tokenspeed,llama.cpp,vllm,openvino-int8"


def peers_command(
    *,
    output: Annotated[
        Path,
        typer.Option(
            help="A folder for reports, pictures and finished runs; the same command goes on where "
            "it was broken off."
        ),
    ],
    model: Annotated[str, typer.Option(help="A name of the catalogue.")] = "qwen2.5-coder-0.5b",
    engines: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Of tokenspeed, llama.cpp, vllm, openvino-int4 and openvino-int8; the others are "
            "compared with the first.",
        ),
    ] = _ENGINES,
    sessions: Annotated[Path | None, typer.Option(help="A file of sessions.")] = None,
    synthetic: Annotated[
        SyntheticName | None, typer.Option(help="Draw sessions [default: swe, without a file].")
    ] = None,
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,...", help="Users at once, a run with each.")
    ] = "1,2,4,8",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds over all engines and users.")] = 2,
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds of a run; sessions begin anew [default: each session once]."),
    ] = 120.0,
    sessions_max: Annotated[
        int | None, typer.Option(min=1, help="Sessions [default: the file's, or 16 drawn ones].")
    ] = None,
    turns_max: Annotated[
        int | None, typer.Option(min=1, help="Turns of a session [default: all].")
    ] = None,
    max_context: Annotated[
        int, typer.Option(min=1, help="End a session before about so many tokens.")
    ] = 16384,
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of each answer [default: as recorded].")
    ] = None,
    tool_gap_scale: Annotated[
        float, typer.Option(min=0.0, help="Factor on the tools' times; 0 removes them.")
    ] = 0.0,
    tps_floor: Annotated[
        float, typer.Option(min=0.0, help="TPS of a good answer; 0 for no goodput.")
    ] = 20.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each server [default: all there are].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn sessions.")] = 0,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Compare engines, each from PyPI in its own environment, with a new server for every run."""
    with reported(log_level), ended_like_interrupted():
        from tokenspeed.bench import check_plotting, live, peers  # noqa: PLC0415
        from tokenspeed.bench.sessions import cut  # noqa: PLC0415
        from tokenspeed.cli.bench_live import (  # noqa: PLC0415
            LiveFigures,
            comparison_table,
            replay_table,
        )

        check_plotting()
        if sessions is None and synthetic is None:
            synthetic = SyntheticName.SWE
        workload = cut(
            sessions_of(sessions, synthetic, sessions_max, seed),
            turns_max=turns_max,
            context_max=max_context,
            output_tokens=output_tokens,
            gap_scale=tool_gap_scale,
        )
        levels = parse_counts("--concurrency", concurrency)
        asked = peers.PeerComparison(
            model=model,
            engines=tuple(dict.fromkeys(engines.replace(",", " ").split())),
            levels=levels,
            repeats=repeats,
            each=live.Pass(users=levels[0], duration_s=duration),
            threads=len(os.sched_getaffinity(0)) if threads is None else threads,
            # Room for what a template and another tokenizer add to the workload's own count.
            context=max_context + max_context // 8,
            floor_tps=tps_floor or None,
            ttft_max_s=None,
        )
        settings = {
            "duration": "each session once" if duration is None else f"{duration:g} s",
            "floor": f"{tps_floor:g} TPS" if tps_floor else "none",
        }
        runs = len(asked.engines) * len(levels) * repeats
        with LiveFigures(runs=runs, turns=workload.turns) as figures:
            reports = peers.measure_peers(
                workload, asked, output, settings=settings, watcher=figures
            )
        measured = [report for report in reports if report.runs]
        if measured:
            live.write_page(measured, output, title=f"{model}, {workload.source}")
        console = Console()
        for report in reports:
            console.print(replay_table(report))
            for launch in report.launches:
                console.print(launch, style="dim", highlight=False, soft_wrap=True)
            console.print()
        ours, *others = reports
        for other in others:
            try:
                found = live.compare(other, ours)
            except WorkloadError:
                # One of the two has no whole run: its report says why.
                continue
            console.print(comparison_table(found, other.plan.label, ours.plan.label))
            console.print()
        failed = [
            f"{report.plan.label}: {report.incomplete}" for report in reports if report.incomplete
        ]
        if failed:
            fail("not all was measured: " + "; ".join(failed))
