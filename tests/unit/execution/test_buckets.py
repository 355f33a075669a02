"""Which steps are captured, and what a plan is filled up to."""

from collections.abc import Sequence

import pytest

from tests.unit.execution.tiny import Planner, Request, config_of
from tokenspeed.core.step import StepPlan
from tokenspeed.engine.sizing import PROPOSAL_LENGTH_MAX
from tokenspeed.execution.buckets import DRAFT_TOKENS_MAX, DRAFT_WIDTHS, bucket_for, buckets_of


def plan_of(lengths: Sequence[int], *, prompt: int = 0) -> StepPlan:
    """A step of decode rows with so many tokens each, and of a prompt's chunk."""
    planner = Planner(config_of(pages=400))
    rows = [Request(slot=slot, prompt=[1], length=3, sampled=1) for slot in range(len(lengths))]
    drafts = {slot: [5] * (length - 1) for slot, length in enumerate(lengths)}
    late = Request(slot=len(lengths), prompt=[7] * (prompt or 1))
    return planner.plan(rows, [(late, prompt)] if prompt else [], drafts=drafts)


def plain_rows(rows_max: int) -> tuple[int, ...]:
    return tuple(bucket.rows for bucket in buckets_of(rows_max))


def test_buckets_leave_little_to_fill() -> None:
    assert plain_rows(1) == (1,)
    assert plain_rows(5) == (1, 2, 4, 5)
    assert plain_rows(100)[-4:] == (56, 64, 96, 100)
    for rows in range(1, 101):
        assert min(size for size in plain_rows(100) if size >= rows) <= max(rows + 7, rows * 1.5)


@pytest.mark.parametrize(
    ("lengths", "rows", "width"),
    [
        ((1, 1, 1), 4, 1),
        ((2,), 1, 2),
        ((1, 2, 1), 4, 2),
        ((3, 1), 2, 4),
        ((4, 4, 4, 4, 4), 8, 4),
        ((1, 5), 2, 8),
        ((8,) * 17, 20, 8),
        ((1,) * 19 + (8,), 20, 8),
    ],
)
def test_a_plan_runs_in_the_smallest_bucket_that_it_fits_into(
    lengths: Sequence[int], rows: int, width: int
) -> None:
    buckets = buckets_of(20, 64)
    found = bucket_for(plan_of(lengths), buckets)
    assert found is not None
    assert (found.rows, found.width) == (rows, width)
    fitting = [
        bucket.tokens
        for bucket in buckets
        if bucket.rows >= len(lengths) and bucket.width >= max(lengths)
    ]
    assert found.tokens == min(fitting)


def test_a_bucket_has_room_for_the_samples_of_its_steps_and_for_no_more_than_there_are() -> None:
    for bucket in buckets_of(64, 64):
        assert bucket.samples == min(bucket.tokens, bucket.rows + 64 * bucket.drafts)
    assert max(bucket.samples for bucket in buckets_of(64, 16)) == 80


def test_steps_with_prompts_longer_rows_or_too_much_to_fill_are_left_to_python() -> None:
    buckets = buckets_of(64, 64)
    assert bucket_for(plan_of((2, 1), prompt=4), buckets) is None
    assert bucket_for(plan_of((1,), prompt=1), buckets) is None
    assert bucket_for(plan_of((9,)), buckets) is None
    assert bucket_for(plan_of((1,) * 32 + (5,)), buckets) is None
    assert bucket_for(plan_of((1,) * 32 + (4,)), buckets) is not None


def test_steps_with_drafts_are_captured_as_often_as_pays() -> None:
    assert not any(bucket.drafts for bucket in buckets_of(64))
    of_drafts = [bucket for bucket in buckets_of(64, 64) if bucket.drafts]
    assert len(of_drafts) == 20
    assert max(bucket.tokens for bucket in of_drafts) == DRAFT_TOKENS_MAX
    # However many rows there are.
    assert sum(bucket.drafts for bucket in buckets_of(1000, 64)) == 21
    # No draft is longer than all drafts of a step.
    assert {bucket.width for bucket in buckets_of(4, 1)} == {1, 2}
    assert {bucket.width for bucket in buckets_of(4, 3)} == {1, 2, 4}


def test_what_a_draft_model_proposes_fits_a_captured_row() -> None:
    assert DRAFT_WIDTHS[-1] == 1 + PROPOSAL_LENGTH_MAX
