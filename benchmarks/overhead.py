"""What the engine costs beside the forward pass.

1. Engine time a step: plan, bind, commit, outcome and the message to the client, in microseconds,
   with a fake runner whose own time is taken off, at 1, 16 and 64 running requests of 50K-token
   contexts; and what of it the accounts of requests take, where time went and how evenly tokens
   came. Checked: every request gets the tokens the fake runner defines.
2. CPU-seconds per 1,000 streamed tokens in servicer and gateway, at 16 and 64 streams, with a
   paced engine of 20 ms a step, and what of it both take when nothing is asked of them. Checked:
   every stream gets the tokens it asked for.

Appends one line a run to benchmarks/history/overhead.jsonl.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.fake_runner import FakeRunner, next_token  # noqa: E402

from tokenspeed import SamplingParams, __version__  # noqa: E402
from tokenspeed.control import Scheduler  # noqa: E402
from tokenspeed.core.config import STREAM_INTERVAL_MS, CacheGroup, SchedulerConfig  # noqa: E402
from tokenspeed.core.step import StepPlan  # noqa: E402
from tokenspeed.engine.core import EngineCore  # noqa: E402
from tokenspeed.engine.ledger import Launched, Ledger  # noqa: E402
from tokenspeed.engine.wire import Submit, encode  # noqa: E402

CONTEXT_TOKENS = 50_000
STEPS = 400
PACE_MS = 20.0
STREAM_TOKENS = 200
IDLE_S = 5.0
STEP_TARGET_US = 150.0
STREAM_TARGET_CPU_S = 0.015


class TimedRunner(FakeRunner):
    """Counts the time it takes, so that it can be taken off."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spent_s = 0.0

    def bind(self, slot: int, params: Any, **request: Any) -> None:
        start_s = time.perf_counter()
        super().bind(slot, params, **request)
        self.spent_s += time.perf_counter() - start_s

    def launch(self, plan: StepPlan) -> SimpleNamespace:
        start_s = time.perf_counter()
        launched = super().launch(plan)
        self.spent_s += time.perf_counter() - start_s
        return launched


class TimedLedger(Ledger):
    """Counts the time it takes in a step."""

    def __init__(self, control: Scheduler) -> None:
        super().__init__(control.interval_bound_us)
        self.spent_s = 0.0

    def launched(self, plan: StepPlan, now_us: int) -> Launched:
        start_s = time.perf_counter()
        launched = super().launched(plan, now_us)
        self.spent_s += time.perf_counter() - start_s
        return launched

    def retired(self, step: Launched, now_us: int, *sampled: Any) -> None:
        start_s = time.perf_counter()
        super().retired(step, now_us, *sampled)
        self.spent_s += time.perf_counter() - start_s

    def close(self, requests: list[int], now_us: int) -> Any:
        start_s = time.perf_counter()
        times = super().close(requests, now_us)
        self.spent_s += time.perf_counter() - start_s
        return times


def engine_step_us(running: int) -> tuple[list[float], list[float]]:
    """Microseconds of each of STEPS decode steps outside the runner, and of the accounts in it."""
    # The first request decodes while the last one prefills, hence the room for outputs.
    outputs_max = STEPS + 1000
    pages = running * ((CONTEXT_TOKENS + outputs_max) // 32 + 2)
    config = SchedulerConfig(
        groups=(CacheGroup(pages=pages),),
        slots_max=running,
        step_tokens_max=8192,
        context_max=2 * CONTEXT_TOKENS,
    )
    runner = TimedRunner(slots_max=running)
    control = Scheduler(config)
    core = EngineCore(control, runner, eos_token_ids=(), overlap_depth=0, seed=0)
    core.ledger = ledger = TimedLedger(control)
    params = SamplingParams(temperature=0.0)
    rng = np.random.Generator(np.random.Philox(1))
    last: dict[int, int] = {}
    for request in range(1, running + 1):
        prompt = rng.integers(0, 1000, CONTEXT_TOKENS, dtype=np.int32)
        core.submit(Submit(request, prompt.tobytes(), params, outputs_max, None, 0, 0, None))
        last[request] = int(prompt[-1])
    counts = dict.fromkeys(last, 0)
    found: list[float] = []
    accounts: list[float] = []
    while len(found) < STEPS:
        runner.spent_s = ledger.spent_s = 0.0
        start_s = time.perf_counter()
        outputs = core.step()
        message = b"" if outputs is None else encode(outputs)
        spent_us = (time.perf_counter() - start_s - runner.spent_s) * 1e6
        assert (outputs is None) == (message == b"")
        if outputs is None:
            continue
        requests = np.frombuffer(outputs.requests, dtype=np.int64).tolist()
        for request, token in zip(
            requests, np.frombuffer(outputs.tokens, dtype=np.int32).tolist(), strict=True
        ):
            position = CONTEXT_TOKENS - 1 + counts[request]
            assert token == next_token(last[request], position), (request, counts[request])
            last[request] = token
            counts[request] += 1
        if min(counts.values()) > 1:
            assert len(requests) == running
            found.append(spent_us)
            accounts.append(ledger.spent_s * 1e6)
    return found, accounts


def cpu_seconds(pid: int) -> float:
    """CPU time of a process's threads so far: in nanoseconds, where ticks of 10 ms would show."""
    spent_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            spent_ns += int((task / "schedstat").read_text().split()[0])
    return spent_ns / 1e9


def idle_share(pids: dict[str, int]) -> dict[str, float]:
    """What share of a CPU each process takes when nothing is asked of it."""
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    time.sleep(IDLE_S)
    return {name: (cpu_seconds(pid) - before[name]) / IDLE_S for name, pid in pids.items()}


async def stream(client: httpx.AsyncClient, model: str, index: int) -> tuple[int, int]:
    """Stream one answer; the tokens the usage counts and the chunks they came in."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"stream number {index}"}],
        "max_tokens": STREAM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens = chunks = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunks += 1
                usage = json.loads(line[6:]).get("usage")
                tokens = usage["completion_tokens"] if usage else tokens
    return tokens, chunks


async def streaming_cpu(url: str, model: str, pids: dict[str, int], streams: int) -> dict[str, Any]:
    """CPU-seconds per 1,000 tokens of each process while `streams` answers stream at once."""
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(stream(client, model, -1 - n) for n in range(2)))
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        found = await asyncio.gather(*(stream(client, model, n) for n in range(streams)))
        after = {name: cpu_seconds(pid) for name, pid in pids.items()}
    tokens = sum(count for count, _ in found)
    assert tokens == streams * STREAM_TOKENS, found
    cost = {name: (after[name] - before[name]) / tokens * 1000 for name in pids}
    return {**cost, "chunks_a_token": sum(chunks for _, chunks in found) / tokens}


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def main() -> None:
    """Measure, print and append to the history."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of the streaming part")
    parser.add_argument("--stream-interval", type=int, default=STREAM_INTERVAL_MS)
    arguments = parser.parse_args()
    console = Console()

    measured = {running: engine_step_us(running) for running in (1, 16, 64)}
    steps = {running: spread(whole) for running, (whole, _) in measured.items()}
    accounts = {running: spread(part) for running, (_, part) in measured.items()}
    for title, rows in (
        ("Engine time a step", steps),
        ("Of it the accounts of requests", accounts),
    ):
        table = Table("running requests", "min us", "median us", "max us", title=title)
        for running, values in rows.items():
            table.add_row(str(running), *(f"{value:.1f}" for value in values.values()))
        console.print(table)

    front = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "support" / "paced_front.py"),
            "smollm2-135m",
            "64",
            str(PACE_MS),
            str(arguments.stream_interval),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert front.stdin is not None
    assert front.stdout is not None
    try:
        ready = json.loads(front.stdout.readline())
        idle = idle_share(ready["pids"])
        runs = {
            streams: [
                asyncio.run(streaming_cpu(ready["url"], ready["model"], ready["pids"], streams))
                for _ in range(arguments.repeats)
            ]
            for streams in (16, 64)
        }
    finally:
        front.stdin.close()
        front.wait()
    streaming = {
        streams: {
            "servicer": spread([run["servicer"] for run in found]),
            "gateway": spread([run["gateway"] for run in found]),
            "both": spread([run["servicer"] + run["gateway"] for run in found]),
            "chunks_a_token": spread([run["chunks_a_token"] for run in found]),
        }
        for streams, found in runs.items()
    }
    title = "CPU-seconds per 1,000 streamed tokens, min and median"
    table = Table("streams", "servicer", "gateway", "both", title=title)
    for streams, parts in streaming.items():
        found = (parts[part] for part in ("servicer", "gateway", "both"))
        table.add_row(str(streams), *(f"{part['min']:.4f} {part['median']:.4f}" for part in found))
    console.print(table)
    for streams in streaming:
        # A stream gets a token in each of the engine's steps.
        costs = {name: share * PACE_MS / streams for name, share in idle.items()}
        console.print(
            f"of it at {streams} streams what both take anyway: servicer {costs['servicer']:.4f}, "
            f"gateway {costs['gateway']:.4f}"
        )
    worst_us = steps[64]["median"]
    worst_cpu_s = max(parts["both"]["median"] for parts in streaming.values())
    console.print(
        f"a step at 64: {worst_us:.0f} us (target {STEP_TARGET_US:.0f}: "
        f"{'met' if worst_us < STEP_TARGET_US else 'missed'}); streaming: {worst_cpu_s:.4f} "
        f"CPU-seconds (target {STREAM_TARGET_CPU_S}: "
        f"{'met' if worst_cpu_s < STREAM_TARGET_CPU_S else 'missed'})"
    )
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "configuration": {
            "context_tokens": CONTEXT_TOKENS,
            "steps": STEPS,
            "pace_ms": PACE_MS,
            "stream_tokens": STREAM_TOKENS,
            "repeats": arguments.repeats,
            "stream_interval_ms": arguments.stream_interval,
        },
        "engine_step_us": steps,
        "accounts_us": accounts,
        "cpu_s_per_1000_tokens": streaming,
        "idle_cpu_share": idle,
    }
    history = ROOT / "benchmarks" / "history" / "overhead.jsonl"
    with history.open("a") as file:
        file.write(json.dumps(record) + "\n")


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
