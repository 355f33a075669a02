"""Which samples of a step count."""

from collections.abc import Sequence

import pytest

from tests.unit.execution.tiny import Planner, Request, config_of, ints
from tokenspeed.core.samples import Samples
from tokenspeed.core.step import StepPlan


def plan_of(drafts: Sequence[Sequence[int]], chunks: Sequence[tuple[int, int]]) -> StepPlan:
    """A step of decode rows with drafts, and of chunks, (context, tokens) of prompts of 9."""
    planner = Planner(config_of(pages=64))
    decodes = [Request(slot=slot, prompt=[1], length=3, sampled=4) for slot in range(len(drafts))]
    prefills = [
        (Request(slot=len(drafts) + index, prompt=[7] * 9, length=context), count)
        for index, (context, count) in enumerate(chunks)
    ]
    return planner.plan(decodes, prefills, drafts=dict(enumerate(drafts)))


def test_each_token_of_a_row_with_a_draft_is_sampled_behind() -> None:
    plan = plan_of([[5, 6], [], [8]], [(0, 4), (2, 7)])
    assert plan.sample_rows.tolist() == [0, 0, 0, 1, 2, 2, 4]
    assert plan.sample_positions.tolist() == [4, 5, 6, 4, 4, 5, 0]
    samples = Samples.of(plan)
    assert samples.tokens_S.tolist() == [0, 1, 2, 3, 4, 5, 16]
    assert samples.later_S.tolist() == [False, True, True, False, False, True, False]


@pytest.mark.parametrize(
    ("sampled", "counting", "lasts"),
    [
        # Nothing right; the second guess is right for nothing.
        ((1, 6, 1, 1, 1, 1, 1), (1, 0, 0, 1, 1, 0, 1), (0, 3, 4, 6)),
        ((5, 1, 1, 1, 8, 1, 1), (1, 1, 0, 1, 1, 1, 1), (1, 3, 5, 6)),
        ((5, 6, 1, 8, 1, 1, 1), (1, 1, 1, 1, 1, 0, 1), (2, 3, 4, 6)),
    ],
)
def test_a_sample_counts_if_all_guesses_before_it_were_right(
    sampled: tuple[int, ...], counting: tuple[int, ...], lasts: tuple[int, ...]
) -> None:
    samples = Samples.of(plan_of([[5, 6], [], [8]], [(0, 4), (2, 7)]))
    assert samples.counting(ints(sampled)).astype(int).tolist() == list(counting)
    assert samples.lasts(ints(sampled)).tolist() == list(lasts)


def test_a_step_without_samples_has_none() -> None:
    samples = Samples.of(plan_of([], [(0, 4)]))
    assert samples.counting(ints([])).tolist() == []
    assert samples.lasts(ints([])).tolist() == []
