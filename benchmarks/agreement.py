"""Our replay and an outside client, agentic-bench, on the same sessions: TTFT and TPS.

Both measure at the same time, each a server of its own on half of the cores, started for the run
and warmed up in the same way; the next pair has the halves the other way round. So whatever else
the machine does happens to both: one after the other, two runs of one client differed by more than
the clients do. Both clients send the same file (agentic-bench's own format), greedily, answers of
the recorded length, tools instant. Ours sends the server's own answers back, theirs the recorded
ones: so a first pass records what the server says, which is the same each time, because greedy
answers do not depend on what else runs. Checked: both had the same prompt and output tokens.
Printed and recorded, of the time to the first token and of tokens a second after it: the median of
all turns, and the median over turns of our figure over theirs, the same turn of the same pair, for
each way round; of these two the geometric mean. Target: within 5%.

    python benchmarks/agreement.py [--model smollm2-135m] [--users 1] [--pairs 4]
                                   [--sessions FILE] [--turns 6] [--count 4]

Appends a line to benchmarks/history/agreement.jsonl.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a client found: tokens of all turns, and of each turn, in the order of the file, the
    seconds to its first token and the tokens a second after it (None where it all came at once)."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: list[float]
    tps: list[float | None]


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


def ours(url: str, model: str, path: Path, users: int) -> Found:
    async def measure() -> live.Run:
        async with live.ChatClient(url, model=model) as client:
            workload = cut(read_sessions(path))
            return await live.replay(client, workload, live.Pass(users=users, salt=""))

    run = asyncio.run(measure())
    errors = [answer.error for answer in run.answers if answer.error is not None]
    assert not errors, errors
    turns = sorted(run.answers, key=lambda answer: (answer.session, answer.turn))
    return Found(
        prompt_tokens=sum(answer.prompt_tokens or 0 for answer in turns),
        output_tokens=sum(answer.tokens for answer in turns),
        ttft_s=[answer.piece_us[0] / 1e6 for answer in turns],
        tps=[rate(answer.tokens, answer.piece_us[-1] - answer.piece_us[0]) for answer in turns],
    )


def rate(tokens: int, span_us: float) -> float | None:
    return (tokens - 1) * 1e6 / span_us if tokens > 1 and span_us > 0 else None


def theirs(url: str, model: str, path: Path, users: int) -> Found:
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
    sessions = sorted(written["sessions"], key=lambda session: str(session["session_id"]))
    turns = [turn for session in sessions for turn in session["turns"]]
    assert all(turn["success"] for turn in turns), "agentic-bench had errors"
    return Found(
        prompt_tokens=sum(turn["input_len"] for turn in turns),
        output_tokens=sum(turn["output_len"] for turn in turns),
        ttft_s=[turn["ttft"] for turn in turns],
        tps=[rate(turn["output_len"], sum(turn["itl_ms"]) * 1e3) for turn in turns],
    )


def ratio(found: dict[str, list[Found]], figure: str) -> tuple[float, list[float]]:
    """Ours over theirs, and the same of the pairs each way round."""
    ways = []
    for first in (0, 1):
        turns = [
            ours / theirs
            for pair in list(zip(*found.values(), strict=True))[first::2]
            for ours, theirs in zip(*(getattr(run, figure) for run in pair), strict=True)
            if ours is not None and theirs is not None
        ]
        ways.append(statistics.median(turns))
    return statistics.geometric_mean(ways), ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--users", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=4, help="an even number")
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
    found: dict[str, list[Found]] = {name: [] for name in clients}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sessions.jsonl"
        with serve(options, Path(folder, "recorder")) as server:
            asyncio.run(record(server.url, options.model, workload, path))
        cores = sorted(os.sched_getaffinity(0))
        halves = [cores[: len(cores) // 2], cores[len(cores) // 2 :]]
        for _ in range(options.pairs):
            with contextlib.ExitStack() as servers, ThreadPoolExecutor(len(clients)) as pool:
                urls = []
                for name, half in zip(clients, halves, strict=True):
                    with confined(half):
                        server = servers.enter_context(serve(options, Path(folder, name)))
                    asyncio.run(warm(server.url, options.model))
                    urls.append(server.url)
                runs = [
                    pool.submit(client, url, options.model, path, options.users)
                    for client, url in zip(clients.values(), urls, strict=True)
                ]
                for name, run in zip(clients, runs, strict=True):
                    found[name].append(run.result())
                    print(f"  {name}: {found[name][-1].tps}", flush=True)
            halves.reverse()
    for figure in ("prompt_tokens", "output_tokens"):
        values = {getattr(run, figure) for runs in found.values() for run in runs}
        assert len(values) == 1, f"the clients did not do the same work: {figure} {values}"
    table = Table(title=f"{options.model}, {options.users} users, {options.pairs} pairs")
    for column in ("figure", *clients, "ratio", "each way round", "within 5%"):
        table.add_column(column)
    ratios = {}
    for figure in ("ttft_s", "tps"):
        ratios[figure], ways = ratio(found, figure)
        medians = [
            statistics.median(
                value for run in runs for value in getattr(run, figure) if value is not None
            )
            for runs in found.values()
        ]
        verdict = "yes" if abs(ratios[figure] - 1) <= TARGET else "NO"
        table.add_row(
            figure,
            *(f"{median:.4g}" for median in medians),
            f"{ratios[figure]:.3f}",
            " / ".join(f"{way:.3f}" for way in ways),
            verdict,
        )
    Console().print(table)
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "machine": live.machine(),
        "load_before": os.getloadavg()[0],
        "model": options.model,
        "users": options.users,
        "threads": threads(),
        "workload": workload.source,
        "runs": {name: [asdict(run) for run in runs] for name, runs in found.items()},
        "ratios": ratios,
    }
    with HISTORY.open("a") as history:
        print(json.dumps(line), file=history)


def serve(options: argparse.Namespace, path: Path) -> peers.Server:
    port = peers.unused_port()
    launch = peers.launch_of(
        "tokenspeed",
        options.model,
        users=options.users,
        port=port,
        threads=threads(),
        context=CONTEXT,
    )
    return peers.Server(launch, port=port, log=path.with_suffix(".log"))


def threads() -> int:
    """Of a server: half of the cores."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


@contextlib.contextmanager
def confined(cores: list[int]) -> Iterator[None]:
    """What is started meanwhile runs on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


if __name__ == "__main__":
    main()
