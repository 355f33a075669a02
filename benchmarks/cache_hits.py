"""What the prefix cache of the real scheduler hits on a recorded trace, beside LRU and the optimum.

    python benchmarks/cache_hits.py ../shared/workloads/swe_agent_requests_django.jsonl

Every request is submitted at its recorded time and runs to its end at that time, alone, prompt and
answer token by token; the pages of the pool are the trace's blocks. The working set is every block
that any prompt or answer of the trace fills; the pool is 25%, 50% and 100% of it, running request
included. `--speed-up N` lets sessions begin N times closer together, each keeping its own pace, so
that more of them live at once than the pool holds. The hit rate is of prompt blocks.

The optimum (Belady) knows all requests in advance and, unlike the engine, needs no room for the
running one: a bound. LRU is the same scheduler with `cache_policy=CachePolicy.LRU`; its hits are
checked against a plain one. Appends a line a run to benchmarks/history/cache_hits.jsonl.
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenspeed import __version__
from tokenspeed.bench.baselines import lru_hits, trace_pages
from tokenspeed.bench.optimum import live_blocks_max, optimum_hits
from tokenspeed.bench.tokens import TraceTokens, assign_tokens
from tokenspeed.bench.trace import BLOCK_TOKENS, Trace, TraceRequest, read_trace
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, CachePolicy, SchedulerConfig

ROOT = Path(__file__).parents[1]
NO_STOP = np.array([], dtype=np.int32)
SHARES = (0.25, 0.5, 1.0)
TARGET_POINTS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--speed-up", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--limit", type=int, help="requests to replay; all if not given")
    options = parser.parse_args()
    trace = read_trace(options.trace, limit=options.limit)
    console = Console()
    for speed_up in options.speed_up:
        rows = compare(crowd(trace, speed_up), speed_up, console)
        record(options.trace.name, speed_up, rows)


def crowd(trace: Trace, speed_up: float) -> Trace:
    """Lets sessions begin `speed_up` times closer together; each keeps its own pace."""
    begins: dict[str | None, int] = {}
    moved: list[TraceRequest] = []
    for request in trace.requests:
        begin = begins.setdefault(request.session, request.sent_us)
        moved.append(replace(request, sent_us=int(begin / speed_up) + request.sent_us - begin))
    return Trace(name=trace.name, requests=tuple(sorted(moved, key=lambda r: r.sent_us)))


def compare(trace: Trace, speed_up: float, console: Console) -> list[dict[str, float]]:
    tokens = assign_tokens(trace)
    read, written, names = trace_pages(trace, tokens, BLOCK_TOKENS)
    prompts = [pages.tolist() for pages in read]
    answers = [pages.tolist() for pages in written]
    requests = [
        (float(request.sent_us), pages)
        for request, pages in zip(trace.requests, prompts, strict=True)
    ]
    blocks = sum(request.input_tokens // BLOCK_TOKENS for request in trace.requests)
    live = live_blocks_max(requests, answers)
    table = Table(
        title=f"{trace.name}, sessions {speed_up:g}x closer: {len(prompts)} requests, "
        f"working set {names} blocks, {live} of them live at once"
    )
    for column in ("pool", "blocks", "ours %", "LRU %", "optimum %", "short by", "within 2"):
        table.add_column(column, justify="right")
    rows = []
    for share in SHARES:
        pages = int(share * names)
        optimum = optimum_hits(requests, pages, written=answers)
        ours, seconds = replay(trace, tokens, pages, CachePolicy.SESSION)
        lru, _ = replay(trace, tokens, pages, CachePolicy.LRU)
        plain = lru_hits(prompts, pages, answers)
        assert abs(lru - plain) <= 0.005 * blocks, f"LRU hit {lru} blocks, a plain one {plain}"
        assert max(ours, lru) <= optimum, "the optimum is none"
        row = {
            "pool": share,
            "blocks": pages,
            "ours": 100 * ours / blocks,
            "lru": 100 * lru / blocks,
            "optimum": 100 * optimum / blocks,
            "seconds": seconds,
        }
        short = row["optimum"] - row["ours"]
        rows.append(row)
        table.add_row(
            f"{share:.0%}",
            str(pages),
            *(f"{row[name]:.2f}" for name in ("ours", "lru", "optimum")),
            f"{short:.2f}",
            "yes" if short <= TARGET_POINTS else "no",
        )
    console.print(table)
    return rows


def replay(trace: Trace, tokens: TraceTokens, pages: int, policy: CachePolicy) -> tuple[int, float]:
    """Blocks that the scheduler's cache served, and the seconds it took."""
    scheduler = Scheduler(
        SchedulerConfig(
            groups=(CacheGroup(pages=pages),),
            page_size=BLOCK_TOKENS,
            slots_max=1,
            step_tokens_max=2**17,
            context_max=2**17,
            cache_policy=policy,
        )
    )
    start_s = time.perf_counter()
    for index, request in enumerate(trace.requests):
        prompt = int(tokens.prompt_starts[index])
        answer = int(tokens.output_starts[index])
        scheduler.submit(
            index,
            tokens.flat[prompt : prompt + request.input_tokens],
            max_new_tokens=request.output_tokens,
            stop_token_ids=NO_STOP,
        )
        for token in range(answer, answer + request.output_tokens):
            plan = scheduler.plan(request.sent_us)
            assert plan is not None, "a request of the trace does not fit the pool"
            scheduler.commit(plan.step, tokens.flat[token : token + 1], request.sent_us)
            outcome = scheduler.take_outcome()
        assert outcome.finished.tolist() == [index]
    scheduler.audit()
    return scheduler.stats().cached_tokens // BLOCK_TOKENS, time.perf_counter() - start_s


def record(name: str, speed_up: float, rows: list[dict[str, float]]) -> None:
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "machine": platform.machine(),
        "trace": name,
        "speed_up": speed_up,
        "rows": rows,
    }
    with (ROOT / "benchmarks/history/cache_hits.jsonl").open("a") as history:
        history.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
