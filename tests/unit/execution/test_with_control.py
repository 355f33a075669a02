"""The real control plane over the real runner: what a request gets does not depend on its way."""

from collections import deque

import numpy as np
import pytest

from tests.unit.execution.tiny import config_of, ints, runner_of
from tokenspeed.control import Scheduler
from tokenspeed.core.sampling import SamplingParams

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
            in_flight.append((plan.step, runner.launch(plan)))
        if in_flight and (plan is None or len(in_flight) > config.overlap_depth):
            step, launched = in_flight.popleft()
            control.commit(step, launched.result().tokens, 0)
        outcome = control.take_outcome()
        for request, token in zip(outcome.requests.tolist(), outcome.tokens.tolist(), strict=True):
            outputs[request].append(token)
        unfinished -= len(outcome.finished)
    runner.close()
    return outputs, control.stats().retractions


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
