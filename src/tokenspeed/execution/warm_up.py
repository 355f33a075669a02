"""Plans that touch every part of a forward once, made without a control plane."""

import numpy as np

from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import GroupPlan, Int32Array, StepPlan

__all__ = ["WARM_UP_PARAMS", "warm_up_plans"]

WARM_UP_PARAMS = SamplingParams(top_k=8, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=1)

PROMPT_TOKENS = 8


def warm_up_plans(config: SchedulerConfig, *, groups: int) -> list[StepPlan]:
    """A prefill and, where page and context have room for it, a decode: slot 0, on page 0."""
    room = min(config.page_size, config.context_max)
    prompt = max(1, min(PROMPT_TOKENS, room - 1, config.step_tokens_max))
    plans = [_plan(0, context=0, tokens=prompt, groups=groups)]
    if prompt < room:
        plans.append(_plan(1, context=prompt, tokens=1, groups=groups))
    return plans


def _plan(step: int, *, context: int, tokens: int, groups: int) -> StepPlan:
    first = context == 0
    group = GroupPlan(
        kv_slots=np.arange(context, context + tokens, dtype=np.int32),
        table_slots=_ints(0) if first else _ints(),
        table_indices=_ints(0) if first else _ints(),
        table_pages=_ints(0) if first else _ints(),
    )
    return StepPlan(
        step=step,
        decode_count=0 if first else 1,
        row_slots=_ints(0),
        query_starts=_ints(0, tokens),
        context_lens=_ints(context),
        token_ids=np.zeros(tokens, dtype=np.int32),
        sample_rows=_ints(0),
        sample_positions=_ints(step),
        bound_slots=_ints(0) if first else _ints(),
        bound_requests=np.zeros(1 if first else 0, dtype=np.int64),
        groups=(group,) * groups,
    )


def _ints(*values: int) -> Int32Array:
    return np.array(values, dtype=np.int32)
