"""A draft model's proposals: when they are asked for, what they are taken to be worth, what they
bring, and that whatever they are, nobody gets another token."""

from typing import Any

import numpy as np
import pytest

from tests.scenario.simulation import i32
from tests.unit.control.worlds import world
from tests.unit.control.writers import Writer, proposing_writer, random_text
from tokenspeed.core.config import CacheGroup, CacheGroupKind, SchedulerConfig
from tokenspeed.core.errors import ConfigError, EngineError
from tokenspeed.core.step import StepPlan, StepWork

PROPOSING = {"step_drafts_max": 16, "step_proposals_max": 12, "proposal_length_max": 4}


def proposed(writer: Writer) -> int:
    return writer.scheduler.stats().proposed_tokens


def time_of(writer: Writer, texts: list[tuple[list[int], list[int]]]) -> int:
    """Microseconds until all have written their texts, side by side."""
    began_us, first = writer.now_us, 500 + 100 * len(writer.finished)
    for request, (prompt, output) in enumerate(texts, first):
        writer.write(request, prompt, output)
    writer.run_until(*range(first, first + len(texts)))
    return writer.now_us - began_us


def speedup(texts: list[tuple[list[int], list[int]]], **changes: Any) -> float:
    """How much faster the same texts are written with the draft model than without, as a ratio."""
    without = time_of(
        proposing_writer(**{**changes, "step_proposals_max": 0, "proposal_length_max": 0}), texts
    )
    writer = proposing_writer(**changes)
    before = proposed(writer), *writer.drafted()
    ratio = without / time_of(writer, texts)
    asked, drafted, accepted = (
        now - then for now, then in zip((proposed(writer), *writer.drafted()), before, strict=True)
    )
    print(f"{asked} proposed, {accepted} of {drafted} drafts accepted, {ratio:.3f} times as fast")
    return ratio


def fresh(seed: int, count: int = 600) -> tuple[list[int], list[int]]:
    """A prompt and an answer without repetition."""
    return random_text(seed, 200), random_text(seed + 1, count)


# --- what they bring ---


@pytest.mark.parametrize("depth", [0, 1])
def test_a_draft_model_that_is_mostly_right_is_asked_all_the_time(depth: int) -> None:
    # At depth 1 whoever proposes skips a step, in which nobody else has use for the machine.
    assert speedup([fresh(1)], right=0.9, overlap_depth=depth) > 1.8


def test_all_rows_share_the_passes_of_the_draft_model() -> None:
    texts = [fresh(10 * n) for n in range(1, 7)]
    assert speedup(texts, right=0.8, round_us=600.0) > 1.5


@pytest.mark.parametrize("sure", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("round_us", [100.0, 1000.0, 5000.0])
def test_a_draft_model_that_is_never_right_costs_less_than_a_hundredth(
    round_us: float, sure: float
) -> None:
    assert speedup([fresh(2, 3000)], right=0.0, sure=sure, round_us=round_us) > 0.99


def test_passes_as_dear_as_steps_are_not_made() -> None:
    assert speedup([fresh(3, 3000)], right=0.5, round_us=4000.0) > 0.99


@pytest.mark.parametrize("sure", [0.1, 1.0])
def test_what_it_says_of_itself_is_put_right_by_what_it_is_worth(sure: float) -> None:
    """Each drafted token is dear, so that only one whose chance is known is worth its time."""
    honest = speedup([fresh(4, 1500)], right=0.6, draft_us=900.0)
    assert speedup([fresh(4, 1500)], right=0.6, draft_us=900.0, sure=sure) > honest - 0.1


def test_longer_proposals_are_asked_for_where_more_of_them_is_right() -> None:
    lengths = []
    for right in (0.5, 0.97):
        writer = proposing_writer(right=right, round_us=600.0)
        prompt, output = fresh(5)
        writer.write(0, prompt, output)
        counts = []
        while 0 not in writer.finished:
            plan = writer.step()
            assert plan is not None
            counts += plan.propose_counts[plan.propose_counts > 0].tolist()
        lengths.append(sum(counts) / len(counts))
    print(lengths)
    assert lengths[0] < 3
    assert lengths[1] > 5


def test_a_model_that_became_right_is_found_out() -> None:
    writer = proposing_writer(right=0.0)
    time_of(writer, [fresh(6, 1000)])
    writer.right = writer.sure = 0.9
    time_of(writer, [fresh(7, 4000)])
    before = writer.drafted()[1]
    time_of(writer, [fresh(8, 600)])
    assert writer.drafted()[1] - before > 300


def test_what_was_read_before_is_not_asked_of_the_draft_model() -> None:
    writer = proposing_writer(right=0.6)
    quoted = random_text(9, 800)
    time_of(writer, [(quoted, quoted[:100])])
    before, drafted = proposed(writer), writer.drafted()
    time_of(writer, [([*quoted, 1], quoted[:600])])
    asked = proposed(writer) - before
    print(f"{asked} tokens proposed, {writer.drafted()[1] - drafted[1]} accepted of 600")
    assert asked < 100
    assert writer.drafted()[1] - drafted[1] > 500


def test_both_kinds_of_drafts_serve_one_text() -> None:
    quoted, new = random_text(20, 300), random_text(21, 300)
    text = (quoted, new[:150] + quoted[:150] + new[150:] + quoted[150:])
    assert speedup([text], right=0.8) > 1.3


def test_proposals_keep_the_floor() -> None:
    writer = proposing_writer(tps_floor=250.0, right=0.9, round_us=400.0)
    prompt, output = fresh(22)
    writer.write(0, prompt, output)
    longest, counts = 0, 0
    while 0 not in writer.finished:
        plan = writer.step()
        assert plan is not None
        counts += int(plan.propose_counts.sum())
        if plan.decode_count:
            longest = max(longest, writer.time_us(StepWork.of(plan)))
    print(f"{counts} tokens proposed, the longest step took {longest} us")
    assert counts > 100
    assert longest < 1.1e6 / 250


def test_models_with_a_recurrence_get_no_proposals() -> None:
    groups = (
        CacheGroup(pages=2000),
        CacheGroup(kind=CacheGroupKind.RECURRENT, pages=40, checkpoint_pages=8),
    )
    writer = proposing_writer(groups=groups, context_max=20_000)
    assert proposed(writer) == 0
    writer.write(0, *fresh(23))
    plan = writer.step()
    assert plan is not None and len(plan.propose_counts) == 0


# --- what comes back ---


def until_it_asks() -> tuple[Any, StepPlan]:
    """A world and a plan in flight that asks for two or more tokens for its one row."""
    w = world(pages=200, **PROPOSING)
    for _ in range(20):
        w.scheduler.observe(StepWork(decode_rows=1), 1000)
    w.scheduler.observe(StepWork(decode_rows=1, proposed_tokens=4, proposal_rounds=4), 1100)
    w.submit(0, range(9), max_new_tokens=60)
    while True:
        plan = w.launch()
        if len(plan.token_ids) < 9 and plan.propose_counts.max(initial=0) > 1:
            return w, plan
        w.commit()


@pytest.mark.parametrize(
    ("starts", "tokens", "chances", "message"),
    [
        ((0, 5), (1, 2, 3, 4, 5), (0.5,) * 5, "at most . tokens for row 0, but proposed 5"),
        ((0, 2), (1, -1), (0.5, 0.5), "a negative token id"),
        ((0, 2), (1, -(2**31)), (0.5, 0.5), "a negative token id"),
        ((0, 2), (1, 2), (0.5,), "2 tokens with 1 chances"),
        ((0, 1), (1, 2), (0.5, 0.5), "does not go from 0 to there"),
        ((1, 2), (1, 2), (0.5, 0.5), "does not go from 0 to there"),
        ((0, 1, 2), (1, 2), (0.5, 0.5), "does not go from 0 to there"),
        ((-(2**31), 2), (1, 2), (0.5, 0.5), "does not go from 0 to there"),
    ],
)
def test_proposals_that_nobody_asked_for_are_refused_and_nothing_has_changed(
    starts: tuple[int, ...], tokens: tuple[int, ...], chances: tuple[float, ...], message: str
) -> None:
    w, plan = until_it_asks()
    result = w.flights[0].result
    given = {
        "proposed_starts": i32(*starts),
        "proposed_tokens": i32(*tokens),
        "proposed_chances": np.array(chances, dtype=np.float32),
    }
    wrong = type(result)(tokens=result.tokens, logprobs=None, **given)
    with pytest.raises(EngineError, match=message):
        w.scheduler.commit(plan.step, result.tokens, w.now_us, result=wrong)
    w.audit()
    w.commit()
    w.drain()


def test_proposals_without_columns_are_none() -> None:
    w, plan = until_it_asks()
    before = w.scheduler.stats().proposed_tokens
    flight = w.flights.popleft()
    w.scheduler.commit(plan.step, flight.result.tokens, w.now_us)
    w.collect(flight)
    assert w.scheduler.stats().proposed_tokens == before
    w.drain()


def test_a_configuration_that_contradicts_itself_is_refused() -> None:
    groups = (CacheGroup(pages=9),)
    with pytest.raises(ConfigError, match="must both be 0 or both be above"):
        SchedulerConfig(groups=groups, context_max=9, step_drafts_max=4, step_proposals_max=4)
    with pytest.raises(ConfigError, match="step_drafts_max must be above 0"):
        SchedulerConfig(groups=groups, context_max=9, step_proposals_max=4, proposal_length_max=2)
    with pytest.raises(ConfigError, match="draft_memory_size_bytes must be in"):
        SchedulerConfig(groups=groups, context_max=9, draft_memory_size_bytes=-1)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("vocabulary", [2, 60])
def test_whatever_is_proposed_nobody_gets_another_token(depth: int, vocabulary: int) -> None:
    """The simulation's draft model knows some tokens, makes up others of any number, and says
    anything of its chances; the simulation compares each token with what its request gets alone."""
    w = world(overlap_depth=depth, step_tokens_max=60, pages=60, context_max=90, **PROPOSING)
    w.vocabulary = vocabulary
    for request in range(30):
        w.submit(request, [request % 2, 1, 0, 1] * 3, max_new_tokens=70, salt=request % 3)
        for _ in range(8):
            w.launch()
            if w.flights and (len(w.flights) > depth or request % 3 == 0):
                w.commit()
        if request % 7 == 6:
            w.abort(request - 2)
    w.drain()
    stats = w.scheduler.stats()
    print(f"{stats.proposed_tokens} proposed, {stats.accepted_tokens} of {stats.drafted_tokens}")
    assert depth or stats.proposed_tokens > 30
    assert stats.retractions > 0
