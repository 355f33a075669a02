"""What a step of one request costs with 0 to 8 drafted tokens, against the step of one token.

Drafts pay where guesses are right more often than they cost. Most of a decode step is the reading
of weights and KV, which a step with a draft reads once, too; what it adds is arithmetic. The KV is
that of nobody: contexts of any length cost no prompt. Lengths take turns, so that a machine which
changes its pace changes it for all of them.

    python benchmarks/draft_steps.py [--model qwen2.5-coder-0.5b] [--context 0 4096 16384]

Appends one line a model to benchmarks/history/draft_steps.jsonl.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenspeed import SamplingParams, __version__
from tokenspeed.core.config import CacheGroup, EngineConfig, SchedulerConfig
from tokenspeed.core.environment import let_threads_sleep
from tokenspeed.core.step import GroupPlan, StepPlan

HISTORY = Path(__file__).parent / "history" / "draft_steps.jsonl"
PAGE = 32


def plan_of(step: int, context: int, drafted: int, *, table: bool) -> StepPlan:
    """A decode row of slot 0 over pages 0, 1, 2, ..., which the table gets where asked for."""
    tokens = 1 + drafted
    pages = np.arange(-(-(context + 64) // PAGE), dtype=np.int32) if table else []
    pages = np.array(pages, dtype=np.int32)
    zeros = np.zeros(tokens, dtype=np.int32)
    return StepPlan(
        step=step,
        decode_count=1,
        row_slots=zeros[:1],
        query_starts=np.array([0, tokens], dtype=np.int32),
        context_lens=np.array([context], dtype=np.int32),
        token_ids=np.arange(100, 100 + tokens, dtype=np.int32),
        sample_rows=zeros,
        sample_positions=np.arange(tokens, dtype=np.int32),
        bound_slots=zeros[:0],
        bound_requests=np.zeros(0, dtype=np.int64),
        groups=(
            GroupPlan(
                kv_slots=np.arange(context, context + tokens, dtype=np.int32),
                table_slots=np.zeros(len(pages), dtype=np.int32),
                table_indices=pages,
                table_pages=pages,
            ),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append")
    parser.add_argument("--context", type=int, nargs="*", default=[0, 4096, 16384])
    parser.add_argument("--drafts-max", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of all threads, for a busy machine"
    )
    parser.add_argument("--no-history", action="store_true")
    options = parser.parse_args()
    let_threads_sleep()
    clock = time.process_time if options.cpu_time else time.perf_counter
    # Only now, because these import torch.
    from tokenspeed.distributed import Place  # noqa: PLC0415
    from tokenspeed.engine.assembly import make_runner, mesh_of, open_model  # noqa: PLC0415

    columns = [f"+{drafted}" for drafted in range(1, options.drafts_max + 1)]
    table = Table("model", "context", "ms of one token", *columns)
    for name in options.model or ["smollm2-135m", "qwen2.5-coder-0.5b"]:
        config = EngineConfig(model=name, threads=options.threads, kv_dtype=options.kv_dtype)
        mesh = mesh_of(config)
        opened = open_model(config, place=Place())
        longest = max(options.context) + 64
        _, _, _, runner = make_runner(
            opened,
            SchedulerConfig(
                groups=(CacheGroup(pages=-(-longest // PAGE) + 1),),
                page_size=PAGE,
                slots_max=8,
                step_drafts_max=options.drafts_max,
                context_max=longest,
            ),
            mesh=mesh,
            place=Place(),
        )
        runner.warm_up()
        runner.bind(
            0,
            SamplingParams(temperature=0.0),
            seed=0,
            prompt_count=1,
            tokens=None,
            stop_token_ids=np.zeros(0, dtype=np.int32),
        )
        found = {}
        for context in options.context:
            runner.launch(plan_of(0, context, 0, table=True)).result()
            times_ms: list[list[float]] = [[] for _ in range(options.drafts_max + 1)]
            for _ in range(options.repeats):
                for drafted, of in enumerate(times_ms):
                    plan = plan_of(0, context, drafted, table=False)
                    began_s = clock()
                    runner.launch(plan).result()
                    of.append((clock() - began_s) * 1e3)
            found[str(context)] = {
                "min_ms": [min(of) for of in times_ms],
                "median_ms": [statistics.median(of) for of in times_ms],
            }
            # Whatever else the machine does makes steps longer, and none shorter.
            one, *more = (min(of) for of in times_ms)
            table.add_row(name, str(context), f"{one:.2f}", *(f"{ms / one:.2f}x" for ms in more))
        runner.close()
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": __version__,
            "model": name,
            "threads": options.threads,
            "kv_dtype": options.kv_dtype,
            "cpu_time": options.cpu_time,
            "contexts": found,
        }
        if not options.no_history:
            with HISTORY.open("a") as history:
                print(json.dumps(line), file=history)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
