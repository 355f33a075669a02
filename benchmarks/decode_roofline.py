"""How near decoding comes to what memory gives: bytes a step must read over its time.

Counted are the packed weights (without a table of embeddings that only looks rows up) and the KV
of the context. What memory gives is measured right before and right after each run, because on a
shared host it changes by the minute; the fraction is of their mean. Targets: 85% on the 1.5B
model, 70% on the 0.5B one. Printed as well: how much of the engine's step is outside the recorded
kernels (target: under 5% on the 135M model).

    python benchmarks/decode_roofline.py [--model qwen2.5-coder-1.5b] [--depth 16 4096]
        [--kv-dtype int8]

Appends one line a model to benchmarks/history/decode_roofline.jsonl.
"""

import argparse
import importlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenspeed import SamplingParams, __version__
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import let_threads_sleep
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.wire import Submit
from tokenspeed.execution import Runner
from tokenspeed.kernels.cpu import Roofline

HISTORY = Path(__file__).parent / "history" / "decode_roofline.jsonl"
STEPS = 48


def decode_steps_s(core: EngineCore, request: int, depth: int) -> tuple[list[float], list[float]]:
    """Times of the steps after a prompt of random tokens, and of what was recorded of each."""
    graph = core.runner._steps.recorded
    assert graph is not None, "the model's steps are not recorded"
    recorded = graph._recording
    recorded_s: list[float] = []

    class Timed:
        """The recording, with a clock."""

        def run(self, *arguments: Any) -> None:
            start_s = time.perf_counter()
            recorded.run(*arguments)
            recorded_s.append(time.perf_counter() - start_s)

    graph._recording = Timed()
    ids = np.random.default_rng(request).integers(1000, 40000, depth, dtype=np.int32).tobytes()
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    core.submit(Submit(request, ids, params, STEPS + 1, 0, 0, 0, None))
    times_s: list[float] = []
    while core.busy:
        start_s = time.perf_counter()
        outputs = core.step()
        if outputs is not None and outputs.tokens:
            times_s.append(time.perf_counter() - start_s)
    graph._recording = recorded
    assert len(times_s) == STEPS + 1
    return times_s[1:], recorded_s[-STEPS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append")
    parser.add_argument("--depth", type=int, nargs="*", default=[16, 4096])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    let_threads_sleep()
    # Only now, because it imports torch.
    build_engine = importlib.import_module("tokenspeed.engine.build").build_engine
    table = Table(
        "model", "depth", "ms a step", "GB a step", "of what memory gave, %", "outside, %"
    )
    for name in options.model or ["smollm2-135m", "qwen2.5-coder-0.5b"]:
        config = EngineConfig(
            model=name,
            threads=options.threads,
            kv_dtype=options.kv_dtype,
            max_context=max(options.depth) + 2 * STEPS,
            max_running=1,
            prefix_cache=False,
            # Steps of one token each.
            speculate="off",
        )
        core = build_engine(config).core
        runner: Runner = core.runner
        model, pools = runner._model, runner._pools
        looked_up = 0 if model.config.tie_embeddings else model.embedding.table.data.nbytes
        weights_size_bytes = model.weights_size_bytes - looked_up
        found: dict[str, Any] = {}
        for depth in options.depth:
            kv_size_bytes = depth * sum(pool.spec.token_size_bytes for pool in pools.pools)
            steps_ms, fractions, outside = [], [], []
            for run in range(options.runs):
                before = Roofline.measure(model.kernels.runtime, repeats=3).read_bytes_per_s
                steps_s, recorded_s = decode_steps_s(core, run, depth)
                step_s = statistics.median(steps_s)
                outside.append((1 - sum(recorded_s) / sum(steps_s)) * 100)
                after = Roofline.measure(model.kernels.runtime, repeats=3).read_bytes_per_s
                steps_ms.append(step_s * 1e3)
                rate = (weights_size_bytes + kv_size_bytes) / step_s
                fractions.append(rate / ((before + after) / 2) * 100)
            found[str(depth)] = {
                "step_ms": steps_ms,
                "fraction_percent": fractions,
                "outside_percent": outside,
            }
            table.add_row(
                name,
                str(depth),
                *(
                    f"{min(of):.2f} / {statistics.median(of):.2f} / {max(of):.2f}"
                    for of in (steps_ms,)
                ),
                f"{(weights_size_bytes + kv_size_bytes) / 1e9:.3f}",
                f"{min(fractions):.0f} / {statistics.median(fractions):.0f} / {max(fractions):.0f}",
                f"{min(outside):.1f} / {statistics.median(outside):.1f} / {max(outside):.1f}",
            )
        core.close()
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": __version__,
            "model": name,
            "threads": options.threads,
            "kv_dtype": options.kv_dtype,
            "weights_size_bytes": weights_size_bytes,
            "depths": found,
        }
        with HISTORY.open("a") as history:
            print(json.dumps(line), file=history)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
