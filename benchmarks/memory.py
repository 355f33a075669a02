"""How much memory an engine process takes: at most packed weights, KV pool and 300 MB.

    python benchmarks/memory.py [--model NAME ...] [--kv-mb N]

Each model is started in a process of its own with a pool of N megabytes and a context of 2,048
tokens; prompts of that length then fill the pool, so that it is resident as a whole, and sampled
answers with penalties and log-probabilities make everything beside it. Resident memory is what the
system counts (/proc/PID/smaps): memory of the process's own, and files that it has mapped, which
other processes share. Appends a line a model to benchmarks/history/memory.jsonl; the exit code is 1
where one is over its bound.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenspeed import __version__
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.engine.process import EngineProcess

HISTORY = Path(__file__).parent / "history" / "memory.jsonl"
MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
BESIDE_MB = 300
CONTEXT = 2048
ANSWER = SamplingParams(
    temperature=0.8, top_p=0.9, frequency_penalty=0.1, logprobs=5, max_new_tokens=8, seed=1,
    ignore_eos=True,
)  # fmt: skip
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+)\s*(.*)$")


def resident_mb(pid: int) -> Mapping[str, float]:
    """Resident memory by kind; "own" is what no file stands behind."""
    kinds: Counter[str] = Counter()
    kind = "own"
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := _MAPPING.match(line):
            inode, name = found.groups()
            kind = "own" if inode == "0" else "torch's files" if "/torch/" in name else "files"
        elif line.startswith("Rss:"):
            kinds[kind] += int(line.split()[1])
    return {name: kinds[name] * 1024 / 1e6 for name in ("own", "torch's files", "files")}


async def measure(model: str, kv_mb: int, threads: int) -> dict[str, float | str]:
    """Start an engine, fill its pool, and count."""
    config = EngineConfig(
        model=model, kv_cache_size_bytes=kv_mb * 10**6, max_context=CONTEXT, threads=threads
    )
    engine = await EngineProcess.start(config)
    try:
        started = resident_mb(engine.pid)
        info = engine.client.info
        generator = np.random.default_rng(0)
        # What one prompt leaves in the cache, the next does not use.
        for _ in range(1 + info.pages * info.page_size // CONTEXT):
            prompt = generator.integers(1000, 2000, CONTEXT - 2 * info.page_size)
            async for _ in engine.client.generate(prompt, ANSWER):
                pass
        used = resident_mb(engine.pid)
    finally:
        await engine.stop()
    weights_mb, pool_mb = info.weights_size_bytes / 1e6, info.kv_size_bytes / 1e6
    return {
        "model": model,
        "weights_mb": weights_mb,
        "kv_mb": pool_mb,
        **{f"{kind} started": size for kind, size in started.items()},
        **used,
        "resident_mb": sum(used.values()),
        "beside_mb": sum(used.values()) - weights_mb - pool_mb,
        "bound_mb": weights_mb + pool_mb + BESIDE_MB,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append")
    parser.add_argument("--kv-mb", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    table = Table(title="Resident megabytes of an engine process")
    columns = ("model", "weights_mb", "kv_mb", "own", "torch's files", "files", "resident_mb",
               "beside_mb", "bound_mb")  # fmt: skip
    for column in columns:
        table.add_column(column.replace("_mb", ""))
    missed = 0
    for model in options.model or MODELS:
        figures = asyncio.run(measure(model, options.kv_mb, options.threads))
        values = (figures[column] for column in columns[1:])
        table.add_row(model, *(f"{value:.0f}" for value in values if isinstance(value, float)))
        missed += int(float(figures["beside_mb"]) > BESIDE_MB)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": __version__,
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": options.threads,
            **figures,
        }
        with HISTORY.open("a") as history:
            print(json.dumps(line), file=history)
    Console().print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
