"""Drafts: where they come from, how long they are, what they bring and what they cost."""

import itertools
import random
from typing import Any

import pytest

from tests.unit.control.worlds import world
from tests.unit.control.writers import Writer, random_text, warm_writer
from tokenspeed._control import draft_lengths
from tokenspeed.core.config import CacheGroup, CacheGroupKind
from tokenspeed.core.errors import EngineError
from tokenspeed.core.step import StepResult, StepWork

# --- what they bring ---


@pytest.mark.parametrize("depth", [0, 1])
def test_text_that_is_quoted_comes_in_long_drafts(depth: int) -> None:
    writer = warm_writer(overlap_depth=depth)
    quoted = random_text(1, 400)
    before, began = writer.drafted(), writer.scheduler.stats().steps
    writer.write(0, quoted + random_text(2, 50), quoted[:300])
    writer.run_until(0)
    drafted, accepted = (now - then for now, then in zip(writer.drafted(), before, strict=True))
    steps = writer.scheduler.stats().steps - began
    print(f"{accepted} of {drafted} drafted tokens accepted, {steps} steps for 300 tokens")
    assert accepted > 250
    assert drafted < 1.2 * accepted
    assert steps < 60


def slowdown(prompt: list[int], output: list[int], draft_us: float) -> float:
    """How much longer an answer takes with drafts than without, as a ratio."""
    times = []
    for most in (64, 0):
        writer = warm_writer(step_drafts_max=most, draft_us=draft_us)
        writer.write(0, prompt, output)
        began_us = writer.now_us
        writer.run_until(0)
        times.append(writer.now_us - began_us)
        drafted = writer.drafted()[0]
        print(f"{drafted} tokens drafted for {len(output)}, each {draft_us} us")
    return times[0] / times[1]


@pytest.mark.parametrize("draft_us", [5.0, 100.0, 500.0, 3000.0])
def test_text_without_repetition_loses_less_than_a_hundredth(draft_us: float) -> None:
    assert slowdown(random_text(3, 500), random_text(4, 1500), draft_us) < 1.01


@pytest.mark.parametrize("draft_us", [5.0, 100.0, 500.0, 3000.0])
def test_text_that_misleads_loses_less_than_a_fiftieth(draft_us: float) -> None:
    """Every token was there before, and something else comes after it every time."""
    prompt, output = random_text(5, 3000, kinds=40), random_text(6, 1500, kinds=40)
    assert slowdown(prompt, output, draft_us) < 1.02


def test_where_a_drafted_token_is_as_dear_as_a_step_few_are_tried() -> None:
    writer = warm_writer(draft_us=4000.0)
    quoted = random_text(7, 400)
    for request in range(4):
        writer.write(request, quoted + random_text(8 + request, 50), quoted[:300])
        writer.run_until(request)
    before = writer.drafted()[0]
    writer.write(9, quoted + random_text(20, 50), quoted[:300])
    writer.run_until(9)
    drafted = writer.drafted()[0] - before
    print(f"{drafted} tokens drafted for 300")
    assert drafted <= 6


def test_a_price_learned_wrong_is_learned_again() -> None:
    writer = warm_writer(draft_us=30_000.0)
    quoted = random_text(9, 400)
    writer.write(0, quoted, quoted[:300])
    writer.run_until(0)
    writer.draft_us = 5.0
    for request in range(1, 8):
        writer.write(request, random_text(request, 50) + quoted, quoted[:390])
        writer.run_until(request)
    before = writer.drafted()[1]
    writer.write(9, quoted, quoted[:300])
    writer.run_until(9)
    assert writer.drafted()[1] - before > 200


def quoting_time(users: int, **changes: Any) -> tuple[int, int]:
    """Microseconds until so many users have quoted 300 tokens, side by side with one who writes
    something new if there are several; and those of the longest step meanwhile."""
    writer = warm_writer(draft_us=400.0, **changes)
    quoted = random_text(10, 400)
    for request in range(6):
        writer.write(request, quoted + random_text(30 + request, 30), quoted[:300])
        writer.run_until(request)
    writer.intervals.clear()
    began_us, longest = writer.now_us, 0
    for request in range(9, 9 + users):
        writer.write(request, quoted + random_text(31 + request, 30), quoted[:300])
    if users > 1:
        writer.write(8, random_text(50, 30), random_text(51, 3000))
    while 9 not in writer.finished:
        plan = writer.step()
        assert plan is not None
        if plan.decode_count > users - 1:
            longest = max(longest, writer.time_us(StepWork.of(plan)))
    return writer.now_us - began_us, longest


def test_drafts_keep_the_floor() -> None:
    """A step may take as many intervals as its rows are expected to give tokens, each of them."""
    # So whoever is alone has the drafts that bring most tokens a second.
    free, _ = quoting_time(1)
    kept, _ = quoting_time(1, tps_floor=250.0)
    print(f"{free} us without a floor, {kept} us with one")
    assert kept < 1.02 * free
    # And whoever gets one token waits for one interval, whatever others could have.
    _, slowest = quoting_time(2)
    _, longest = quoting_time(2, tps_floor=250.0)
    print(f"the longest step took {slowest} us without a floor, {longest} us with one")
    assert slowest > 2e6 / 250
    assert longest < 1.1e6 / 250


# --- whose text ---


def turns(writer: Writer, first: dict[str, int], second: dict[str, int]) -> int:
    """Accepted tokens of a request whose answer was another's, and is not in its prompt."""
    prompt, answer = random_text(11, 300), random_text(12, 200)
    writer.write(0, prompt, answer, **first)
    writer.run_until(0)
    before = writer.drafted()[1]
    writer.write(1, prompt, answer, **second)
    writer.run_until(1)
    return writer.drafted()[1] - before


def test_the_next_turn_goes_on_from_what_was_written() -> None:
    assert turns(warm_writer(), {"tenant": 3, "salt": 4}, {"tenant": 3, "salt": 4}) > 150


@pytest.mark.parametrize("other", [{"tenant": 3, "salt": 5}, {"tenant": 2, "salt": 4}])
def test_nobody_is_shown_what_another_wrote(other: dict[str, int]) -> None:
    assert turns(warm_writer(), {"tenant": 3, "salt": 4}, other) == 0


@pytest.mark.parametrize(
    ("other", "drafts"),
    [
        ({"tenant": 3, "salt": 4}, True),
        ({"tenant": 3, "salt": 5}, False),
        ({"tenant": 2, "salt": 4}, False),
    ],
)
def test_what_one_agent_wrote_is_foreseen_by_its_tenants_others(
    other: dict[str, int], drafts: bool
) -> None:
    writer = warm_writer()
    answer = random_text(16, 300)
    writer.write(0, random_text(17, 100), answer, tenant=3, salt=4)
    writer.run_until(0)
    before = writer.drafted()[1]
    # Its prompt begins otherwise, and holds none of it.
    writer.write(1, random_text(18, 100), random_text(19, 20) + answer[50:], **other)
    writer.run_until(1)
    accepted = writer.drafted()[1] - before
    assert accepted > 200 if drafts else accepted == 0


@pytest.mark.slow
def test_a_tenants_text_is_forgotten_by_generations() -> None:
    writer = warm_writer(context_max=200_000)
    texts = [random_text(50 + n, 3000, kinds=50_000) for n in range(50)]
    for request, answer in enumerate(texts):
        writer.write(request, random_text(request, 100), answer)
        writer.run_until(request)

    def accepted(request: int, answer: list[int]) -> int:
        before = writer.drafted()[1]
        writer.write(request, random_text(request, 100), answer)
        writer.run_until(request)
        return writer.drafted()[1] - before

    # The young generation, the old one, and what went with the one before.
    assert accepted(100, texts[48][:300]) > 200
    assert accepted(101, texts[25][:300]) > 200
    assert accepted(102, texts[0][:300]) == 0


def test_a_long_prompt_is_read_over_many_plans() -> None:
    writer = warm_writer(step_tokens_max=8192)
    quoted = random_text(13, 30_000, kinds=50_000)
    before = writer.drafted()[0]
    writer.write(0, quoted, quoted[:60])
    for _ in range(10):
        writer.step()
    assert writer.drafted()[0] == before, "a draft was made before the prompt was read"
    writer.write(1, quoted[:5000], quoted[:1000])
    writer.run_until(1)
    assert writer.drafted()[1] > 700


# --- how long they are ---


def best_by_trial(
    chances: list[list[float]], rows: int, step_us: float, token_us: float, most: int
) -> float:
    """The most tokens a microsecond that any lengths give."""
    best = 0.0
    for lengths in itertools.product(*(range(len(row) + 1) for row in chances)):
        if sum(lengths) <= most:
            tokens = rows + sum(
                sum(row[:length]) for row, length in zip(chances, lengths, strict=True)
            )
            best = max(best, tokens / (step_us + token_us * sum(lengths)))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_lengths_are_those_that_give_the_most_tokens_a_second(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    rows = rng.randrange(1, 5)
    chances = []
    for _ in range(rows):
        chance, row = 1.0, []
        for _ in range(rng.randrange(6)):
            chance *= rng.uniform(0.2, 1.0)
            row.append(chance)
        chances.append(row)
    step_us, token_us = rng.uniform(100, 1000), rng.uniform(1, 400)
    most = rng.randrange(12)
    lengths = draft_lengths(
        chances=chances, rows=rows, step_us=step_us, token_us=token_us, limit_us=None, most=most
    )
    assert sum(lengths) <= most
    tokens = rows + sum(sum(row[:n]) for row, n in zip(chances, lengths, strict=True))
    found = tokens / (step_us + token_us * sum(lengths))
    assert found == pytest.approx(best_by_trial(chances, rows, step_us, token_us, most), rel=1e-5)


@pytest.mark.parametrize(
    ("chances", "rows", "limit_us", "lengths"),
    [
        # 130 us are within 3.4 times 40.
        ([[0.9, 0.8, 0.7]], 1, 40.0, [3]),
        ([[0.9, 0.8, 0.7]], 1, 30.0, [0]),
        # Another row gets one token.
        ([[0.9, 0.8, 0.7]], 2, 125.0, [2]),
        ([[0.9, 0.8, 0.7], []], 2, 115.0, [1, 0]),
        # It gets 1.5, and 150 us are within 1.5 times 100.
        ([[0.9, 0.8, 0.7], [0.5, 0.4]], 2, 100.0, [3, 2]),
        ([[0.9, 0.8, 0.7], [0.5, 0.1]], 2, 90.0, [2, 1]),
        ([[0.9, 0.8, 0.7], [0.5, 0.1]], 2, 70.0, [0, 0]),
    ],
)
def test_a_step_is_no_longer_than_its_least_row_gets_tokens(
    chances: list[list[float]], rows: int, limit_us: float, lengths: list[int]
) -> None:
    found = draft_lengths(
        chances=chances, rows=rows, step_us=100.0, token_us=10.0, limit_us=limit_us, most=9
    )
    assert found == lengths


# --- rows ---


def test_what_was_drafted_and_accepted_is_reported_with_the_end() -> None:
    writer = warm_writer()
    quoted = random_text(14, 300)
    writer.write(0, quoted, quoted[:200])
    before = writer.drafted()
    writer.run_until(0)
    (outcome,) = [outcome for outcome in writer.outcomes if 0 in outcome.finished.tolist()]
    found = outcome.draft_reports[outcome.finished.tolist().index(0)].tolist()
    assert found == [now - then for now, then in zip(writer.drafted(), before, strict=True)]
    assert found[1] > 150


@pytest.mark.parametrize("most", [0, 1, 3])
def test_guesses_that_were_not_run_count_for_nothing(most: int) -> None:
    writer = warm_writer()
    quoted = random_text(14, 300)
    # Samples behind the cut are what the text says, and not to be taken for it.
    writer.write(0, quoted, quoted[:200])
    writer.guesses_max = most
    before = writer.drafted()
    writer.run_until(0)
    assert writer.written[0] == quoted[:200]
    (outcome,) = [outcome for outcome in writer.outcomes if 0 in outcome.finished.tolist()]
    drafted, accepted = outcome.draft_reports[outcome.finished.tolist().index(0)].tolist()
    assert (drafted, accepted) == tuple(
        now - then for now, then in zip(writer.drafted(), before, strict=True)
    )
    steps = max(sum(0 in one.requests.tolist() for one in writer.outcomes), 1)
    assert accepted <= drafted <= most * steps
    assert (accepted > 50) == (most > 0)
    writer.scheduler.audit()


def test_a_cut_is_of_a_draft_of_the_step() -> None:
    writer = warm_writer()
    quoted = random_text(14, 300)
    writer.write(0, quoted, quoted[:200])
    while True:
        plan = writer.scheduler.plan(writer.now_us)
        assert plan is not None
        writer._bound.update(
            zip(plan.bound_slots.tolist(), plan.bound_requests.tolist(), strict=True)
        )
        samples = writer.result(plan).tokens
        if plan.query_starts[plan.decode_count] > plan.decode_count:
            break
        writer.scheduler.commit(plan.step, samples, writer.now_us)
    slot, guesses = int(plan.row_slots[0]), len(plan.token_ids) - 1
    for cuts in ({slot: guesses}, {slot: -1}, {slot + 1: 0}, {slot: 0, slot + 1: 0}):
        result = StepResult(tokens=samples, logprobs=None, cuts=cuts)
        with pytest.raises(EngineError, match="has no draft in slot"):
            writer.scheduler.commit(plan.step, samples, writer.now_us, result=result)
    writer.scheduler.commit(plan.step, samples, writer.now_us)
    writer.scheduler.audit()


def test_models_with_a_recurrence_get_no_drafts() -> None:
    groups = (
        CacheGroup(pages=2000),
        CacheGroup(kind=CacheGroupKind.RECURRENT, pages=40, checkpoint_pages=8),
    )
    writer = warm_writer(groups=groups, context_max=20_000)
    quoted = random_text(15, 300)
    writer.write(0, quoted, quoted[:200])
    writer.run_until(0)
    assert writer.drafted() == (0, 0)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_small_vocabulary_is_drafted_and_nobody_gets_another_token(depth: int) -> None:
    """The device of the simulation watches every slot that a wrong guess was written to."""
    simulation = world(overlap_depth=depth, step_drafts_max=12, step_tokens_max=40, pages=200)
    simulation.vocabulary = 2
    for request in range(6):
        simulation.submit(request, [request % 2, 1, 0, 1] * 4, max_new_tokens=60)
    simulation.drain()
    stats = simulation.scheduler.stats()
    print(f"{stats.accepted_tokens} of {stats.drafted_tokens} drafted tokens accepted")
    assert depth or stats.drafted_tokens > 50
    assert depth or stats.accepted_tokens > 10


# --- how much they keep ---

MIB = 2**20


def fill(writer: Writer, texts: list[list[int]], limit: int) -> None:
    """Requests that write these, one after the other, watched for what is kept of them."""
    for request, answer in enumerate(texts):
        writer.write(request, random_text(1000 + request, 60), answer)
        while request not in writer.finished:
            writer.step()
            assert writer.scheduler.stats().draft_memory_size_bytes <= limit


def test_what_is_kept_stays_below_its_limit_and_the_least_recently_used_goes() -> None:
    writer = warm_writer(draft_memory_size_bytes=MIB)
    texts = [random_text(60 + n, 700, kinds=50_000) for n in range(20)]
    fill(writer, texts, MIB)
    kept = writer.scheduler.stats().draft_memory_size_bytes
    print(f"{kept} bytes kept of {sum(map(len, texts))} tokens")
    assert kept > MIB // 2

    def foreseen(request: int, answer: list[int]) -> int:
        before = writer.drafted()[1]
        writer.write(100 + request, random_text(1000 + request, 60), answer)
        writer.run_until(100 + request)
        assert writer.scheduler.stats().draft_memory_size_bytes <= MIB
        return writer.drafted()[1] - before

    # The last but one, since a request asked again is the last itself; then what went first.
    assert foreseen(18, texts[18]) > 400
    assert foreseen(0, texts[0]) == 0


@pytest.mark.parametrize("limit", [0, 10_000, 300_000])
def test_where_there_is_no_room_requests_go_without_drafts(limit: int) -> None:
    writer = warm_writer(draft_memory_size_bytes=limit)
    quoted = random_text(80, 4000)
    writer.write(0, quoted, quoted[:300])
    writer.write(1, quoted[:20], quoted[:300])
    while {0, 1} - set(writer.finished):
        writer.step()
        assert writer.scheduler.stats().draft_memory_size_bytes <= limit


def test_what_is_shared_makes_way_too() -> None:
    writer = warm_writer(draft_memory_size_bytes=MIB)
    for request in range(6):
        writer.write(request, [request], random_text(90 + request, 900), tenant=request)
        writer.run_until(request)
    quoted = random_text(99, 6000)
    writer.write(10, quoted, quoted[:300])
    while 10 not in writer.finished:
        writer.step()
        assert writer.scheduler.stats().draft_memory_size_bytes <= MIB
    assert writer.drafted()[1] > 250
