"""One user of a Llama-3-8B of random weights: decode steps at depth, through the runner."""

import statistics
import time
from typing import Any

import numpy as np
import torch

from tokenspeed.cache import KVPools
from tokenspeed.core.config import CacheGroup, SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import GroupPlan, Int32Array, StepPlan
from tokenspeed.execution import LaunchedStep, Runner
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling import ModelConfig, build_model

__all__ = ["LLAMA_3_8B", "decode_plan", "one_user"]

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16_384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_PAGE_SIZE = 64
_STEPS, _WARM_STEPS = 64, 8


def one_user(
    device: torch.device,
    read_bytes_per_s: float,
    *,
    sizes: dict[str, Any] = LLAMA_3_8B,
    depth: int = 8192,
) -> dict[str, float]:
    """Tokens a second of one user, and the share of what memory gives.

    Args:
        device: where.
        read_bytes_per_s: what memory gives.
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
    steps = _WARM_STEPS + _STEPS
    pages = -(-(depth + steps + 1) // _PAGE_SIZE)
    config = SchedulerConfig(
        groups=(CacheGroup(pages=pages),),
        page_size=_PAGE_SIZE,
        slots_max=4,
        step_tokens_max=512,
        context_max=pages * _PAGE_SIZE,
        overlap_depth=1,
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
    runner.close()
    step_s = statistics.median(np.diff(ends[_WARM_STEPS:]).tolist())
    size_bytes = weight_bytes + depth * sum(spec.token_size_bytes for spec in specs)
    return {
        "depth": depth,
        "step_us": step_s * 1e6,
        "tokens_per_s": 1 / step_s,
        "of_bandwidth": size_bytes / step_s / read_bytes_per_s,
    }


def decode_plan(step: int, context: int, pages: int) -> StepPlan:
    """One decode row in slot 0, whose page i is page i.

    Args:
        step: the plan's number.
        context: tokens before.
        pages: entries of the page table that are written.
    """
    entries = np.arange(pages, dtype=np.int32)
    group = GroupPlan(
        kv_slots=_ints(context),
        table_slots=np.zeros_like(entries),
        table_indices=entries,
        table_pages=entries,
    )
    return StepPlan(
        step=step,
        decode_count=1,
        row_slots=_ints(0),
        query_starts=_ints(0, 1),
        context_lens=_ints(context),
        token_ids=_ints(0),
        sample_rows=_ints(0),
        sample_positions=_ints(step),
        bound_slots=_ints(),
        bound_requests=np.zeros(0, dtype=np.int64),
        groups=(group,),
    )


def _ints(*values: int) -> Int32Array:
    return np.array(values, dtype=np.int32)
