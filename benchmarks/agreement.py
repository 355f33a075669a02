"""Our replay and an outside client, agentic-bench, on the same sessions: TTFT and TPS, A B A B.

Every run has a server of ours started for it and warmed up in the same way. Both clients send the
same file (agentic-bench's own format), greedily, answers of the recorded length, tools instant.
Ours sends the server's own answers back, theirs the recorded ones: so a first pass records what the
server says, which is the same each time, because greedy answers do not depend on what else runs.
Checked: both had the same prompt and output tokens. Printed and recorded: medians over turns of
the time to the first token and of tokens a second after it, and the median of our figure over
theirs within a pair. Target: within 5%.

    python benchmarks/agreement.py [--model smollm2-135m] [--users 1] [--pairs 3]
                                   [--sessions FILE] [--turns 6] [--count 4]

Appends a line to benchmarks/history/agreement.jsonl.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokenspeed import __version__
from tokenspeed.bench import live, peers
from tokenspeed.bench.sessions import (
    SWE,
    Session,
    Workload,
    cut,
    generate_sessions,
    read_sessions,
)

HISTORY = Path(__file__).parent / "history" / "agreement.jsonl"
CONTEXT = 8192
TARGET = 0.05

Figures = dict[str, float]


async def record(url: str, model: str, workload: Workload, path: Path) -> None:
    """Have the server answer once, and write what both clients read."""
    async with live.ChatClient(url, model=model) as client:
        await live.warm_up(client, attempts=30)
        with path.open("w") as file:
            for session in workload.sessions:
                print(json.dumps(await recorded(client, session)), file=file)


async def recorded(client: live.ChatClient, session: Session) -> dict[str, object]:
    history: list[dict[str, str]] = []
    turns = []
    for index, turn in enumerate(session.turns):
        # As users' words all of it: agentic-bench puts a system prompt of its own in place of one.
        sent = [{"role": "user", "content": entry.content} for entry in turn.messages]
        assert turn.output_tokens is not None
        answer = await client.answer([*history, *sent], output_tokens=turn.output_tokens)
        assert answer.error is None, answer.error
        history += [*sent, {"role": "assistant", "content": answer.text}]
        turns.append(
            {
                "index": index,
                "input_delta": sent,
                "assistant_text": answer.text,
                "input_tokens": answer.prompt_tokens,
                "output_tokens": turn.output_tokens,
                "cached_tokens": 0,
                "pre_gap_ms": 0.0,
            }
        )
    source = dict.fromkeys(("dataset", "agent", "model", "trial"), "recorded")
    return {
        "session_id": session.name,
        "source": source,
        "system_prompt": "",
        "turns": turns,
    }


async def warm(url: str, model: str) -> None:
    async with live.ChatClient(url, model=model) as client:
        await live.warm_up(client, attempts=30)
        await live.calibrate(client)


def ours(url: str, model: str, path: Path, users: int) -> Figures:
    async def measure() -> live.Run:
        async with live.ChatClient(url, model=model) as client:
            workload = cut(read_sessions(path))
            return await live.replay(client, workload, live.Pass(users=users, salt=""))

    found = live.summarise_run(asyncio.run(measure()))
    assert not found.errors and not found.wrong_lengths, found.error_kinds
    assert found.ttft_s is not None and found.tps is not None
    return {
        "turns": found.answers,
        "prompt_tokens": found.prompt_tokens,
        "output_tokens": found.output_tokens,
        "ttft_s": found.ttft_s.p50,
        "tps": found.tps.p50,
    }


def theirs(url: str, model: str, path: Path, users: int) -> Figures:
    report = path.with_name("theirs.jsonl")
    report.unlink(missing_ok=True)
    count = len(path.read_text().splitlines())
    subprocess.run(
        [
            *(str(peers.python("agentic-bench")), "-m", "abench", "run", "--base-url", url),
            *("--model", model, "--backend", "openai", "--dataset-path", str(path)),
            *("--max-concurrency", str(users), "--num-sessions", str(count), "--no-gaps"),
            *("--warmup-requests", "0", "--disable-tqdm", "--output-file", str(report)),
        ],
        check=True,
        cwd=path.parent,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    written = json.loads(report.read_text().splitlines()[-1])
    turns = [turn for session in written["sessions"] for turn in session["turns"]]
    assert all(turn["success"] for turn in turns), "agentic-bench had errors"
    several = [turn for turn in turns if turn["output_len"] > 1 and sum(turn["itl_ms"]) > 0]
    return {
        "turns": len(turns),
        "prompt_tokens": sum(turn["input_len"] for turn in turns),
        "output_tokens": sum(turn["output_len"] for turn in turns),
        "ttft_s": statistics.median(turn["ttft"] for turn in turns),
        "tps": statistics.median(
            (turn["output_len"] - 1) * 1e3 / sum(turn["itl_ms"]) for turn in several
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--users", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sessions", type=Path, help="a file of sessions; drawn ones by default")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--count", type=int, default=4, help="sessions")
    options = parser.parse_args()
    if options.sessions is None:
        workload = generate_sessions(SWE, count=options.count, seed=1)
    else:
        workload = read_sessions(options.sessions, limit=options.count)
    workload = cut(workload, turns_max=options.turns, context_max=CONTEXT * 3 // 4)
    clients = {"ours": ours, "agentic-bench": theirs}
    found: dict[str, list[Figures]] = {name: [] for name in clients}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sessions.jsonl"
        with serve(options, Path(folder)) as server:
            asyncio.run(record(server.url, options.model, workload, path))
        for _ in range(options.pairs):
            for name, client in clients.items():
                with serve(options, Path(folder)) as server:
                    asyncio.run(warm(server.url, options.model))
                    found[name].append(client(server.url, options.model, path, options.users))
                print(f"  {name}: {found[name][-1]}", flush=True)
    for figure in ("turns", "prompt_tokens", "output_tokens"):
        values = {run[figure] for runs in found.values() for run in runs}
        assert len(values) == 1, f"the clients did not do the same work: {figure} {values}"
    table = Table(title=f"{options.model}, {options.users} users, medians of turns")
    for column in ("figure", *clients, "ratio", "within 5%"):
        table.add_column(column)
    ratios = {}
    for figure in ("ttft_s", "tps"):
        pairs = zip(*found.values(), strict=True)
        ratios[figure] = statistics.median(a[figure] / b[figure] for a, b in pairs)
        medians = [statistics.median(run[figure] for run in runs) for runs in found.values()]
        verdict = "yes" if abs(ratios[figure] - 1) <= TARGET else "NO"
        table.add_row(
            figure, *(f"{median:.4g}" for median in medians), f"{ratios[figure]:.3f}", verdict
        )
    Console().print(table)
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "machine": live.machine(),
        "load_before": os.getloadavg()[0],
        "model": options.model,
        "users": options.users,
        "threads": options.threads,
        "workload": workload.source,
        "runs": found,
        "ratios": ratios,
    }
    with HISTORY.open("a") as history:
        print(json.dumps(line), file=history)


def serve(options: argparse.Namespace, folder: Path) -> peers.Server:
    port = peers.unused_port()
    launch = peers.launch_of(
        "tokenspeed",
        options.model,
        users=options.users,
        port=port,
        threads=options.threads,
        context=CONTEXT,
    )
    return peers.Server(launch, port=port, log=folder / "server.log")


if __name__ == "__main__":
    main()
