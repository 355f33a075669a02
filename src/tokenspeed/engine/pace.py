"""Learns what steps cost on this machine before the first request comes."""

import time
from collections import deque

import numpy as np

from tokenspeed.control import Scheduler
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import StepWork
from tokenspeed.engine.core import LaunchedStep, StepRunner

__all__ = ["CONTEXT_TOKENS", "learn_pace", "tps_alone"]

CONTEXT_TOKENS = 512
"""The context at which the rate of one user alone is told."""

_BUDGET_S = 1.0
_PROMPT_TOKENS_MIN = 16
_OUTPUT_TOKENS = 12
_USERS_MAX = 4


def learn_pace(runner: StepRunner, config: SchedulerConfig, control: Scheduler) -> None:
    """Run made-up requests for about a second and teach `control` how long their steps took.

    Prompts of doubling length, each decoded for some tokens, then several users at once. They are
    planned by a scheduler of their own, so that nothing of them stays but the times and, in pages
    that no request reads, their KV. To be called before any request.
    """
    ends_s = time.monotonic() + _BUDGET_S
    longest = min(config.context_max - _OUTPUT_TOKENS, config.step_tokens_max, CONTEXT_TOKENS)
    # The first of its kind pays for what is made once, so it is left out.
    _run(runner, config, [min(_PROMPT_TOKENS_MIN, max(longest, 1))])
    tokens = _PROMPT_TOKENS_MIN
    while tokens <= longest and time.monotonic() < ends_s:
        _teach(control, _run(runner, config, [tokens]))
        tokens *= 2
    users = min(_USERS_MAX, config.slots_max)
    if users > 1 and longest >= _PROMPT_TOKENS_MIN and time.monotonic() < ends_s:
        _teach(control, _run(runner, config, [_PROMPT_TOKENS_MIN] * users))


def tps_alone(control: Scheduler, config: SchedulerConfig) -> float | None:
    """Tokens a second that one user alone gets, as far as `control` knows; None before it does."""
    context = min(CONTEXT_TOKENS, config.context_max)
    step_us = control.predict_us(StepWork(decode_rows=1, context_tokens=context))
    return 1e6 / step_us if step_us > 0 else None


def _teach(control: Scheduler, steps: list[tuple[StepWork, int]]) -> None:
    for work, took_us in steps:
        control.observe(work, took_us)


def _run(
    runner: StepRunner, config: SchedulerConfig, prompts: list[int]
) -> list[tuple[StepWork, int]]:
    """Work and microseconds of each step that requests of so long prompts take."""
    scheduler = Scheduler(config)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    none = np.zeros(0, dtype=np.int32)
    for request, tokens in enumerate(prompts):
        scheduler.submit(
            request,
            np.full(tokens, request, dtype=np.int32),
            max_new_tokens=_OUTPUT_TOKENS,
            stop_token_ids=none,
        )
    steps: list[tuple[StepWork, int]] = []
    flying: deque[tuple[int, StepWork, LaunchedStep]] = deque()
    began_s = time.monotonic()
    while True:
        plan = scheduler.plan(0)
        if plan is not None:
            for slot, request in zip(plan.bound_slots.tolist(), plan.bound_requests, strict=True):
                runner.bind(
                    slot,
                    params,
                    seed=0,
                    prompt_count=prompts[int(request)],
                    tokens=None,
                    stop_token_ids=none,
                    grammar=None,
                )
            flying.append((plan.step, StepWork.of(plan), runner.launch(plan)))
        elif not flying:
            return steps
        if plan is None or len(flying) > config.overlap_depth:
            step, work, launched = flying.popleft()
            scheduler.commit(step, launched.result().tokens, 0)
            now_s = time.monotonic()
            steps.append((work, int((now_s - began_s) * 1e6)))
            began_s = now_s
