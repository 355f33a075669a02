"""How long an engine takes to start, and what keeping packed weights in a file would save.

    python benchmarks/start.py [MODEL] [--runs N]

Each start is a process of its own, timed from before it is spawned until it could take requests;
the model has been downloaded and verified, and its file is in the system's cache. After each start
another process does the least that a file of packed weights would need: reading as many bytes into
fresh huge pages, on two threads. Appends to benchmarks/history/start.jsonl.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokenspeed import __version__
from tokenspeed.core.config import EngineConfig
from tokenspeed.engine.process import EngineProcess
from tokenspeed.engine.wire import LoadProgress
from tokenspeed.loader import resolve

ROOT = Path(__file__).parents[1]
READ_SIZE_BYTES = 8 << 20
READERS = 2


async def start(model: str) -> dict[str, int]:
    """Start an engine process; nanoseconds since the epoch at which each stage ended."""
    weights_ns: list[int] = []

    def note(progress: LoadProgress) -> None:
        if progress.stage == "Loading weights":
            weights_ns.append(time.time_ns())

    engine = await EngineProcess.start(EngineConfig(model=model), on_progress=note)
    ready_ns = time.time_ns()
    await engine.stop()
    return {
        "process, imports, files, first weight": weights_ns[0],
        "the other weights": weights_ns[-1],
        "KV, warm-up, tokenizer": ready_ns,
    }


def read(model: str) -> float:
    """Read a model's file into fresh huge pages; seconds."""
    import torch  # noqa: PLC0415

    from tokenspeed.kernels.cpu import prefer_huge_pages  # noqa: PLC0415

    path = resolve(model).path
    size_bytes = path.stat().st_size
    begin_s = time.perf_counter()
    memory = torch.empty(size_bytes, dtype=torch.uint8)
    prefer_huge_pages(memory)
    view = memoryview(memory.numpy())

    def read_part(index: int) -> None:
        at, end = (size_bytes * part // READERS for part in (index, index + 1))
        with path.open("rb", buffering=0) as file:
            while at < end:
                at += os.preadv(file.fileno(), [view[at : min(end, at + READ_SIZE_BYTES)]], at)

    threads = [threading.Thread(target=read_part, args=(index,)) for index in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin_s


def read_in_process(model: str) -> float:
    """Seconds that `read` takes in a process of its own."""
    result = subprocess.run(
        [sys.executable, __file__, model, "--read"], stdout=subprocess.PIPE, check=True
    )
    return float(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="qwen2.5-coder-1.5b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(read(options.model))
        return
    resolve(options.model)
    seconds: dict[str, list[float]] = {}
    for run in range(options.runs + 1):
        last_ns = begin_ns = time.time_ns()
        stages = asyncio.run(start(options.model))
        read_s = read_in_process(options.model)
        if run == 0:
            # The first brings the file into the system's cache.
            continue
        for stage, at_ns in stages.items():
            seconds.setdefault(stage, []).append((at_ns - last_ns) / 1e9)
            last_ns = at_ns
        seconds.setdefault("start", []).append((last_ns - begin_ns) / 1e9)
        seconds.setdefault("reading packed weights instead", []).append(read_s)
    table = Table(title=f"Start of {options.model}, {options.runs} runs, seconds")
    for name in ("stage", "min", "median", "max"):
        table.add_column(name)
    figures = {
        stage: {"min": min(values), "median": statistics.median(values), "max": max(values)}
        for stage, values in seconds.items()
    }
    for stage, figure in figures.items():
        table.add_row(stage, *(f"{value:.2f}" for value in figure.values()))
    Console().print(table)
    record = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "model": options.model,
        "runs": options.runs,
        "seconds": figures,
    }
    with (ROOT / "benchmarks/history/start.jsonl").open("a") as history:
        history.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
