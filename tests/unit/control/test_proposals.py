"""A draft model's proposals: when they are asked for, what they are taken to be worth, what they
bring, and that whatever they are, nobody gets another token."""

from typing import Any

import numpy as np
import pytest

from tests.scenario.simulation import i32
from tests.unit.control.worlds import world
from tests.unit.control.writers import Writer, proposing_writer, random_text, warm_writer
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


# --- a model that reads what it is to propose for ---


def test_a_cheap_model_is_asked_within_a_few_steps_and_reads_no_more_than_its_window() -> None:
    writer = proposing_writer(right=0.8, read_us=2.0, proposal_window=128)
    began, asked = writer.read, proposed(writer)
    prompt, output = random_text(30, 2000), random_text(31, 400)
    writer.write(0, prompt, output)
    plans = [writer.step() for _ in range(12)]
    # Nobody waits longer for a first token.
    assert plans[0] is not None and not plans[0].propose_counts.any()
    assert proposed(writer) - asked >= 8
    writer.run_until(0)
    # The window, and what came of each ask.
    assert 127 <= writer.read - began < 127 + 400
    assert proposed(writer) - asked > 300


def test_what_is_read_must_pay_for_itself() -> None:
    """Reading a window takes as long as 21 steps; proposals save half of all steps."""
    asked = []
    for tokens in (12, 300):
        writer = proposing_writer(right=0.9, read_us=500.0, proposal_window=128)
        time_of(writer, [(random_text(n, 300), random_text(n + 1, tokens)) for n in (40, 50)])
        for n in range(8):
            time_of(writer, [(random_text(60 + n, 300), random_text(70 + n, tokens))])
        before = proposed(writer)
        time_of(writer, [(random_text(32, 300), random_text(33, tokens))])
        asked.append(proposed(writer) - before)
    print(asked)
    assert asked[0] == 0
    assert asked[1] > 100


@pytest.mark.parametrize("right", [0.0, 0.6])
def test_a_model_that_never_pays_costs_little_after_the_first_requests(right: float) -> None:
    """Its passes are as dear as steps, and reading is as dear as a prompt."""
    times = []
    for most in (8, 0):
        writer = warm_writer(
            right=right,
            round_us=2500.0,
            read_us=20.0,
            proposal_window=512,
            proposal_length_max=most,
            step_proposals_max=8 * most,
        )
        for n in range(4):
            time_of(writer, [(random_text(n, 1500), random_text(100 + n, 150))])
        texts = [(random_text(200 + n, 1500), random_text(300 + n, 150)) for n in range(40)]
        times.append(sum(time_of(writer, [text]) for text in texts))
        print(f"{writer.read} tokens read, {proposed(writer)} proposed")
    print(f"{times[1] / times[0]:.4f} times as fast with it")
    assert times[1] / times[0] > 0.98


def test_nobody_reads_while_prompts_wait() -> None:
    writer = proposing_writer(right=0.9, read_us=5.0, proposal_window=512, step_tokens_max=256)
    writer.write(0, random_text(80, 600), random_text(81, 200))
    for _ in range(3):
        writer.step()
    before = writer.read
    for request in (1, 2):
        writer.write(request, random_text(80 + 2 * request, 1500), random_text(7, 30))
    for _ in range(10):
        plan = writer.step()
        assert plan is not None and len(plan.row_slots) > plan.decode_count
        assert not plan.propose_counts.any()
    assert writer.read == before


# --- the floor ---


def test_proposals_keep_the_floor() -> None:
    """A step may take as many intervals as its users get tokens, so a user alone has all that bring
    more tokens a second."""
    floor = {"tps_floor": 250.0, "right": 0.95, "round_us": 400.0}
    alone = speedup([fresh(22)], **{**floor, "tps_floor": None})
    assert speedup([fresh(22)], **floor) > 0.98 * alone > 1.5
    # Two get at least what is promised.
    writer = proposing_writer(**floor)
    asked, began_us = proposed(writer), writer.now_us
    writer.write(0, *fresh(24))
    writer.write(1, *fresh(26))
    writer.run_until(0, 1)
    rate = 600e6 / (writer.now_us - began_us)
    print(f"{proposed(writer) - asked} tokens proposed, {rate:.0f} tokens a second")
    assert proposed(writer) - asked > 100
    assert rate > 250


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
