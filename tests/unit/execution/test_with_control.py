"""The real control plane over the real runner: what a request gets does not depend on its way."""

import re
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest

from tests.support.grammars import grammar
from tests.unit.execution.tiny import config_of, ints, runner_of
from tokenspeed.control import Scheduler
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import Runner
from tokenspeed.grammar import TokenTable

PARAMS = (
    SamplingParams(temperature=0.0, max_new_tokens=18),
    SamplingParams(temperature=0.9, top_p=0.9, max_new_tokens=18),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, max_new_tokens=18),
    SamplingParams(temperature=0.0, presence_penalty=2.0, max_new_tokens=18),
    SamplingParams(top_k=9, min_p=0.05, max_new_tokens=18),
)

# The tiny model's 61 tokens: letters, digits, some pairs, and an end.
TEXTS = [*"abcdefghijklmnopqrstuvwxyz0123456789", *(f"{a}{b}" for a in "abcd" for b in "efghij")]
TABLE = TokenTable(texts=[text.encode() for text in [*TEXTS, "</s>"]], special=[60], ends=[60])
CONFINED = (
    (SamplingParams(temperature=0.0, max_new_tokens=18), "[a-d]+7[x-z]{3,}9[0-4]*"),
    (SamplingParams(temperature=1.2, max_new_tokens=18), "([a-j]{2}[0-9])*"),
    (SamplingParams(repetition_penalty=1.3, max_new_tokens=18), "(ae|bf|cg)+[k-z]*"),
    (SamplingParams(temperature=0.9, max_new_tokens=18, ignore_eos=True), "[a-z]{4}"),
    (
        SamplingParams(temperature=0.0, max_new_tokens=18, ignore_eos=True, logit_bias={60: 100.0}),
        "[a-z]*",
    ),
)


def generate(
    requests: list[tuple[list[int], SamplingParams]],
    patterns: Sequence[str | None] = (),
    **sizes: int,
) -> tuple[list[list[int]], int]:
    """Tokens of each request, all submitted at once, and how often one was retracted."""
    config = config_of(**sizes)
    runner, control = runner_of(config), Scheduler(config)
    outputs = generate_with(runner, control, config, requests, patterns)
    runner.close()
    return outputs, control.stats().retractions


def generate_with(
    runner: Runner,
    control: Scheduler,
    config: SchedulerConfig,
    requests: list[tuple[list[int], SamplingParams]],
    patterns: Sequence[str | None] = (),
) -> list[list[int]]:
    """Tokens of each request, all submitted at once; texts of those with a pattern follow it."""
    grammars = {
        request: grammar(StructuredOutputs(regex=pattern), TABLE)
        for request, pattern in enumerate(patterns)
        if pattern is not None
    }
    ends = {request: ints(TABLE.ends if request in grammars else []) for request in range(99)}
    for request, (prompt, params) in enumerate(requests):
        control.submit(
            request,
            ints(prompt),
            max_new_tokens=params.max_new_tokens,
            stop_token_ids=ends[request],
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
                    tokens=control.tokens(request),
                    stop_token_ids=ends[request],
                    grammar=grammars.get(request),
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


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_a_constraint_holds_alone_together_and_after_retraction_and_touches_no_other_row(
    overlap_depth: int,
) -> None:
    random = np.random.default_rng(9)
    confined = [
        (random.integers(0, 60, size=7 + 3 * index).tolist(), params)
        for index, (params, _) in enumerate(CONFINED)
    ]
    free = [
        (random.integers(0, 60, size=9 + 2 * index).tolist(), params)
        for index, params in enumerate(PARAMS[:3])
    ]
    patterns = [pattern for _, pattern in CONFINED]
    alone = [
        generate([request], [pattern])[0][0]
        for request, pattern in zip(confined, patterns, strict=True)
    ] + [generate([request])[0][0] for request in free]
    together, _ = generate(confined + free, patterns, overlap_depth=overlap_depth)
    assert together == alone
    crowded, retractions = generate(
        confined + free, patterns, overlap_depth=overlap_depth, pages=18, step_tokens_max=9
    )
    assert retractions > 0
    assert crowded == alone
    for tokens, pattern in zip(alone, patterns, strict=False):
        text = b"".join(TABLE.texts[token] for token in tokens if token != 60).decode()
        if tokens[-1] == 60:
            assert re.fullmatch(pattern, text), text
        else:
            assert len(tokens) == 18
    # Asked not to end, one can do nothing else, and the other goes on.
    assert alone[3][-1] == 60
    assert len(alone[4]) == 18


def test_a_grammar_that_cannot_be_followed_fails_its_request_and_no_other() -> None:
    config = config_of()
    runner, control = runner_of(config), Scheduler(config)
    wrong = grammar(StructuredOutputs(regex="[a-z]{9}"), TABLE)
    for request in (0, 1):
        control.submit(request, ints([1, 2, 3]), max_new_tokens=4, stop_token_ids=ints([]))
    plan = control.plan(0)
    assert plan is not None
    for slot, request in zip(plan.bound_slots.tolist(), (0, 1), strict=True):
        runner.bind(
            slot,
            SamplingParams(temperature=0.0),
            seed=0,
            prompt_count=3,
            # As if a text had been written that the grammar does not take.
            tokens=ints([1, 2, 3, *([30] if request == 1 else [])]),
            stop_token_ids=ints([60]),
            grammar=wrong,
        )
    result = runner.launch(plan).result()
    assert list(result.failures) == [int(plan.bound_slots[1])]
    assert result.failures[int(plan.bound_slots[1])]
    runner.close()
