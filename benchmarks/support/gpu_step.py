"""One user of a Llama-3-8B of random weights: decode steps at depth, through the runner.

    python -m benchmarks.support.gpu_step

Prints one line of JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks.support.gpu_sizes import LLAMA_3_8B, STEPS, WARM_STEPS
from tokenspeed.cache import KVPools
from tokenspeed.core.config import CacheGroup, SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import GroupPlan, Int32Array, StepPlan
from tokenspeed.execution import LaunchedStep, Runner
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling import ModelConfig, build_model

__all__ = ["decode_plan", "one_user"]

_PAGE_SIZE = 64
# Guesses of a draft: rows of so many and one more fill a captured step.
_DRAFTED = 3


def one_user(
    device: torch.device,
    *,
    sizes: dict[str, Any] = LLAMA_3_8B,
    depth: int = 8192,
) -> dict[str, float]:
    """Tokens a second of one user, the bytes that a step reads, and how long a step with a draft
    takes, captured and through Python.

    Args:
        device: where.
        sizes: the model's configuration.
        depth: tokens before the first step; their KV is zero.
    """
    dtype = torch.bfloat16
    model = build_model(
        ModelConfig.from_hf(sizes),
        dtype=dtype,
        device=device,
        kernels=KernelSelector(device=device, dtype=dtype),
    )
    weight_bytes = 0
    for name, weight in model.weights():
        weight.data.normal_(std=0.02)
        # Of the table of embeddings a step reads one row.
        if "embed" not in name:
            weight_bytes += weight.data.numel() * weight.data.itemsize
    steps = WARM_STEPS + STEPS
    pages = -(-(depth + steps + 1 + _DRAFTED) // _PAGE_SIZE)
    config = SchedulerConfig(
        groups=(CacheGroup(pages=pages),),
        page_size=_PAGE_SIZE,
        slots_max=4,
        step_tokens_max=512,
        context_max=pages * _PAGE_SIZE,
        overlap_depth=1,
        step_drafts_max=_DRAFTED,
    )
    specs = model.kv_specs()
    pools = KVPools(
        specs, pages=pages, page_size=_PAGE_SIZE, device=device, padded=device.type == "cuda"
    )
    for layer in range(sizes["num_hidden_layers"]):
        for part in pools.layer(0, layer):
            part.zero_()
    runner = Runner(model, pools, config, device=device, threads=None)
    runner.warm_up()
    runner.bind(
        0,
        SamplingParams(temperature=0.0),
        seed=0,
        prompt_count=depth,
        tokens=None,
        stop_token_ids=_ints(),
    )
    ends = []
    under_way: LaunchedStep | None = None
    for step in range(steps):
        launched = runner.launch(decode_plan(step, depth + step, pages if step == 0 else 0))
        if under_way is not None:
            under_way.result()
            ends.append(time.perf_counter())
        under_way = launched
    assert under_way is not None
    under_way.result()
    captured_s = _drafted_step_s(runner, depth + steps)
    runner._steps.recorded = None
    through_python_s = _drafted_step_s(runner, depth + steps)
    runner.close()
    step_s = statistics.median(np.diff(ends[WARM_STEPS:]).tolist())
    size_bytes = weight_bytes + depth * sum(spec.token_size_bytes for spec in specs)
    return {
        "depth": depth,
        "step_us": step_s * 1e6,
        "tokens_per_s": 1 / step_s,
        "size_bytes": size_bytes,
        "drafted_step_us": captured_s * 1e6,
        "drafted_step_through_python_us": through_python_s * 1e6,
    }


def _drafted_step_s(runner: Runner, context: int) -> float:
    """Seconds of a step that verifies a draft, its tokens read before the next."""
    took = []
    for step in range(WARM_STEPS + STEPS):
        start = time.perf_counter()
        runner.launch(decode_plan(step, context, 0, drafted=_DRAFTED)).result()
        took.append(time.perf_counter() - start)
    return statistics.median(took[WARM_STEPS:])


def decode_plan(step: int, context: int, pages: int, *, drafted: int = 0) -> StepPlan:
    """One decode row in slot 0, whose page i is page i.

    Args:
        step: the plan's number.
        context: tokens before.
        pages: entries of the page table that are written.
        drafted: guesses behind the row's token.
    """
    tokens = 1 + drafted
    entries = np.arange(pages, dtype=np.int32)
    group = GroupPlan(
        kv_slots=np.arange(context, context + tokens, dtype=np.int32),
        table_slots=np.zeros_like(entries),
        table_indices=entries,
        table_pages=entries,
    )
    return StepPlan(
        step=step,
        decode_count=1,
        row_slots=_ints(0),
        query_starts=_ints(0, tokens),
        context_lens=_ints(context),
        token_ids=np.zeros(tokens, dtype=np.int32),
        sample_rows=np.zeros(tokens, dtype=np.int32),
        sample_positions=np.arange(step, step + tokens, dtype=np.int32),
        bound_slots=_ints(),
        bound_requests=np.zeros(0, dtype=np.int64),
        groups=(group,),
    )


def _ints(*values: int) -> Int32Array:
    return np.array(values, dtype=np.int32)


def main() -> int:
    """The command; see above."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(json.dumps(one_user(torch.device("cuda"))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
