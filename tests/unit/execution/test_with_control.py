"""The real control plane over the real runner: what a request gets does not depend on its way."""

from collections import deque

import numpy as np
import pytest

from tests.unit.execution.tiny import config_of, ints, runner_of
from tokenspeed.control import Scheduler
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import Runner

PARAMS = (
    SamplingParams(temperature=0.0, max_new_tokens=18),
    SamplingParams(temperature=0.9, top_p=0.9, max_new_tokens=18),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, max_new_tokens=18),
    SamplingParams(temperature=0.0, presence_penalty=2.0, max_new_tokens=18),
    SamplingParams(top_k=9, min_p=0.05, max_new_tokens=18),
)


def generate(
    requests: list[tuple[list[int], SamplingParams]], **sizes: int
) -> tuple[list[list[int]], int]:
    """Tokens of each request, all submitted at once, and how often one was retracted."""
    config = config_of(**sizes)
    runner, control = runner_of(config), Scheduler(config)
    outputs = generate_with(runner, control, config, requests)
    runner.close()
    return outputs, control.stats().retractions


def generate_with(
    runner: Runner,
    control: Scheduler,
    config: SchedulerConfig,
    requests: list[tuple[list[int], SamplingParams]],
) -> list[list[int]]:
    """Tokens of each request, all submitted at once."""
    for request, (prompt, params) in enumerate(requests):
        control.submit(
            request,
            ints(prompt),
            max_new_tokens=params.max_new_tokens,
            stop_token_ids=ints([]),
        )
    outputs: list[list[int]] = [[] for _ in requests]
    in_flight: deque = deque()
    unfinished = len(requests)
    while unfinished:
        plan = control.plan(0)
        if plan is not None:
            bound = zip(plan.bound_slots.tolist(), plan.bound_requests.tolist(), strict=True)
            for slot, request in bound:
                prompt, params = requests[request]
                runner.bind(
                    slot,
                    params,
                    seed=len(prompt),
                    prompt_count=len(prompt),
                    tokens=control.tokens(request) if params.needs_history else None,
                    stop_token_ids=ints([]),
                )
            in_flight.append((plan, runner.launch(plan)))
        if in_flight and (plan is None or len(in_flight) > config.overlap_depth):
            done, launched = in_flight.popleft()
            control.commit(done.step, launched.result().tokens, 0)
            for transfer in done.transfers.ids.tolist():
                control.transferred(transfer, complete=True)
        outcome = control.take_outcome()
        for request, token in zip(outcome.requests.tolist(), outcome.tokens.tolist(), strict=True):
            outputs[request].append(token)
        unfinished -= len(outcome.finished)
    return outputs


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_kv_that_comes_back_from_the_host_gives_the_same_tokens(overlap_depth: int) -> None:
    random = np.random.default_rng(5)
    params = SamplingParams(temperature=0.0, max_new_tokens=6)
    prompts = [random.integers(0, 61, size=30).tolist() for _ in range(3)]
    # The pool holds one of them; each comes back after the others have pushed it out.
    config = config_of(overlap_depth=overlap_depth, pages=12, host_pages=40)
    runner, control = runner_of(config), Scheduler(config)
    first, again = (
        [generate_with(runner, control, config, [(prompt, params)])[0] for prompt in prompts]
        for _ in range(2)
    )
    assert first == again
    stats = control.stats()
    assert stats.loads >= 3 * (30 // 4) - 3
    assert stats.stores >= stats.loads
    runner.close()


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_tokens_are_the_same_alone_together_and_after_retraction(overlap_depth):
    random = np.random.default_rng(8)
    requests = [
        (random.integers(0, 61, size=7 + 3 * index).tolist(), params)
        for index, params in enumerate(PARAMS)
    ]
    alone = [generate([request])[0][0] for request in requests]
    together, _ = generate(requests, overlap_depth=overlap_depth)
    assert together == alone
    crowded, retractions = generate(
        requests, overlap_depth=overlap_depth, pages=16, step_tokens_max=9
    )
    assert retractions > 0
    assert crowded == alone
