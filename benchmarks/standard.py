"""The standard set, under ten minutes on two cores: `make bench`.

The engine alone (`tokenspeed bench offline`) on the two small models, then agents' sessions against
a served one (`tokenspeed bench replay`: drawn sessions cut to 8K of context, tools instant, 1, 2, 4
and 8 users for a minute each). Checked: no answer failed, each has the length that was asked for.
Appends a line to benchmarks/history/standard.jsonl, draws docs/frontier.png, and writes the table
between the marks in README.md.

    python benchmarks/standard.py [--seconds 60] [--no-redraw]
"""

import argparse
import asyncio
import dataclasses
import importlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from tokenspeed import __version__
from tokenspeed.bench import live, offline, peers
from tokenspeed.bench.sessions import SWE, cut, generate_sessions
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import let_threads_sleep

ROOT = Path(__file__).parents[1]
HISTORY = Path(__file__).parent / "history" / "standard.jsonl"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
SERVED = "qwen2.5-coder-0.5b"
USERS = (1, 2, 4, 8)
CONTEXT = 8192
PLANS = {
    "smollm2-135m": offline.OfflinePlan(),
    # Longer steps: fewer of them tell as much.
    SERVED: offline.OfflinePlan(prefill=(2048,), repeats=2, new_tokens=32),
}


def engine_alone(name: str, plan: offline.OfflinePlan) -> tuple[offline.OfflineRow, ...]:
    # Only now, because it imports torch.
    build_engine = importlib.import_module("tokenspeed.engine.build").build_engine
    core = build_engine(plan.configure(EngineConfig(model=name))).core
    return offline.measure_offline(core, plan)


async def sweep(url: str, pid: int, seconds: float) -> live.ReplayReport:
    drawn = generate_sessions(SWE, count=32, seed=0)
    workload = cut(drawn, context_max=CONTEXT * 7 // 8, gap_scale=0.0)
    asked = live.Sweep(
        levels=USERS, repeats=1, each=live.Pass(users=1, duration_s=seconds), pids=(pid,)
    )
    began_at = time.time()
    async with live.ChatClient(url, model=SERVED) as client:
        await live.warm_up(client, attempts=30)
        runs = await live.sweep(client, workload, asked)
        plan = live.SweepPlan(
            label="TokenSpeed",
            url=url,
            model=SERVED,
            workload=workload.source,
            workload_digest=live.digest(workload),
            sessions=len(workload.sessions),
            turns=workload.turns,
            concurrency=USERS,
            repeats=1,
            settings={"duration": f"{seconds:g} s", "context": str(CONTEXT)},
        )
        return live.report_of(
            plan,
            [live.summarise_run(run) for run in runs],
            version=__version__,
            machine=live.machine(),
            began_at=began_at,
            forced_lengths=client.forces_lengths,
            incomplete=live.missing(asked, runs),
        )


def table(report: live.ReplayReport, alone: dict[str, tuple[offline.OfflineRow, ...]]) -> str:
    """What the README shows, in Markdown."""
    when = time.strftime("%Y-%m-%d", time.gmtime(report.began_at))
    lines = [
        "![TPS of a user against output tokens a minute](docs/frontier.png)",
        "",
        f"Agents' sessions (drawn, {CONTEXT // 1024}K of context, tools instant) on "
        f"{report.plan.model}, {report.machine}, {when}:",
        "",
        "| users | TPS of a user, p50 | output TPM | TTFT p50 | TTFT p99 | cached |",
        "|---|---|---|---|---|---|",
    ]
    for run in report.runs:
        assert run.tps is not None and run.ttft_s is not None
        cached = "" if run.cached_part_by_usage is None else f"{run.cached_part_by_usage:.0%}"
        lines.append(
            f"| {run.users} | {run.tps.p50:.1f} | {run.output_tpm:,.0f} | "
            f"{run.ttft_s.p50:.2f} s | {run.ttft_s.p99:.2f} s | {cached} |"
        )
    lines += [
        "",
        "The engine alone, tokens a second:",
        "",
        "| model | work | users | tokens of context | tokens a second |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row.work} | {row.users} | {row.tokens} | {row.tokens_per_s.mean:,.0f} |"
        for name, rows in alone.items()
        for row in rows
    ]
    return "\n".join(lines)


def redraw(text: str, drawn: str) -> str:
    """A page with what stands between its marks replaced."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert mark and end, f"the page lacks the marks {BEGIN} and {END}"
    return f"{before}{BEGIN}\n{drawn}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each number of users")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-redraw", action="store_true", help="leave README and picture alone")
    options = parser.parse_args()
    began_s = time.monotonic()
    load = os.getloadavg()[0]
    port = peers.unused_port()
    launch = peers.launch_of(
        "tokenspeed",
        SERVED,
        users=max(USERS),
        port=port,
        threads=options.threads,
        context=CONTEXT,
    )
    # Served first: this process has no threads of its own yet that could be in the way.
    with (
        tempfile.TemporaryDirectory() as folder,
        peers.Server(launch, port=port, log=Path(folder) / "log") as server,
    ):
        report = asyncio.run(sweep(server.url, server.pid, options.seconds))
    assert report.incomplete is None, report.incomplete
    for run in report.runs:
        assert not run.errors and not run.wrong_lengths, run.error_kinds
    let_threads_sleep()
    alone = {}
    for name, plan in PLANS.items():
        alone[name] = engine_alone(name, plan)
        print(f"  {name}: measured alone after {time.monotonic() - began_s:.0f} s", flush=True)
    drawn = table(report, alone)
    print(drawn)
    line: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "machine": report.machine,
        "load_before": load,
        "threads": options.threads,
        "took_s": time.monotonic() - began_s,
        "launch": str(launch),
        "replay": msgspec.to_builtins(report),
        "offline": {
            name: [dataclasses.asdict(row) for row in rows] for name, rows in alone.items()
        },
    }
    with HISTORY.open("a") as history:
        print(json.dumps(line), file=history)
    if not options.no_redraw:
        picture = live.draw_frontier([report], title=f"{SERVED}, agents' sessions")
        (ROOT / "docs" / "frontier.png").write_bytes(picture)
        readme = ROOT / "README.md"
        readme.write_text(redraw(readme.read_text(), drawn))


if __name__ == "__main__":
    main()
