"""Learns what steps cost on this machine before the first request comes."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tokenspeed.control import Scheduler
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import GroupPlan, Int32Array, StepPlan, StepWork
from tokenspeed.engine.core import LaunchedStep, StepRunner

__all__ = ["CONTEXT_TOKENS", "learn_drafts", "learn_pace", "tps_alone"]

CONTEXT_TOKENS = 512
"""The context at which the rate of one user alone is told."""

_BUDGET_S = 1.0
_PROMPT_TOKENS_MIN = 16
_OUTPUT_TOKENS = 12
_USERS_MAX = 4
_DRAFTS_BUDGET_S = 0.2
_DRAFTS_CONTEXT = 128
_DRAFTS = (0, 1, 2, 4, 8)
_PROPOSED = (1, 2, 4)


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


def learn_drafts(runner: StepRunner, config: SchedulerConfig, control: Scheduler) -> Iterator[None]:
    """Run a made-up row with drafts of some lengths and teach `control` how long its steps took:
    yields behind each step. Where there are to be no drafts, there are none.

    In all it takes a fifth of a second, or one step of each length where those take longer. The KV
    is nobody's: pages that no request reads. To be gone on with before any request only; whoever
    leaves off leaves the rest to be learned of the steps of requests.
    """
    if not config.step_drafts_max:
        return
    most = min(config.step_drafts_max, config.step_tokens_max - 1)
    lengths = [drafted for drafted in _DRAFTS if drafted <= most]
    room = min(config.context_max, config.page_size * min(group.pages for group in config.groups))
    context = min(_DRAFTS_CONTEXT, room - 1 - lengths[-1])
    if context < 1:
        return

    def bind() -> None:
        runner.bind(
            0,
            SamplingParams(temperature=0.0, ignore_eos=True),
            seed=0,
            prompt_count=1,
            tokens=np.zeros(context + 1, dtype=np.int32),
            stop_token_ids=np.zeros(0, dtype=np.int32),
            grammar=None,
        )

    bind()
    proposed = [count for count in _PROPOSED if count <= config.proposal_length_max]
    ends_s = time.monotonic() + _DRAFTS_BUDGET_S * (2 if proposed else 1)
    # The first of its kind pays for what is made once, so it is left out.
    plans = [_drafting(config, context, drafted) for drafted in lengths]
    plans += [
        replace(plans[0], propose_counts=np.full(1, count, dtype=np.int32)) for count in proposed
    ]
    for plan in (plans[-1], plans[len(lengths) - 1]):
        runner.launch(plan).result()
        yield
    while True:
        for plan in plans:
            if plan is plans[-1] and config.proposal_window:
                # It is to be read again.
                bind()
            began_s = time.monotonic()
            result = runner.launch(plan).result()
            took_us = int((time.monotonic() - began_s) * 1e6)
            control.observe(StepWork.of(plan).ran(result), took_us)
            yield
        if time.monotonic() >= ends_s:
            return


def _drafting(config: SchedulerConfig, context: int, drafted: int) -> StepPlan:
    """A decode row of slot 0, with a draft, over the first pages of each group."""

    def ints(*values: int) -> Int32Array:
        return np.array(values, dtype=np.int32)

    tokens = 1 + drafted
    pages = np.arange(-(-(context + tokens) // config.page_size), dtype=np.int32)
    group = GroupPlan(
        kv_slots=np.arange(context, context + tokens, dtype=np.int32),
        table_slots=np.zeros_like(pages),
        table_indices=pages,
        table_pages=pages,
    )
    return StepPlan(
        step=0,
        decode_count=1,
        row_slots=ints(0),
        query_starts=ints(0, tokens),
        context_lens=ints(context),
        token_ids=np.zeros(tokens, dtype=np.int32),
        sample_rows=np.zeros(tokens, dtype=np.int32),
        sample_positions=np.arange(tokens, dtype=np.int32),
        bound_slots=ints(),
        bound_requests=np.zeros(0, dtype=np.int64),
        groups=(group,) * len(config.groups),
    )


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
