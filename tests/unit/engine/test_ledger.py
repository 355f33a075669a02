"""Where time goes: by hand over a few steps, and over random runs of the real engine."""

import random
from dataclasses import replace

import numpy as np
import pytest
from tests.support.fake_runner import FakeRunner

from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import Int32Array, StepPlan, TransferKind, Transfers
from tokenspeed.engine.core import EngineCore, step_timing
from tokenspeed.engine.facts import RequestTimes
from tokenspeed.engine.ledger import INTERVAL_BOUNDS_US, PHASES, Ledger, StepClock
from tokenspeed.engine.wire import Submit, live_requests, request_times

CONSTRAINT, QUEUE, RESTORE, PREFILL, STALL, DECODE = range(PHASES)


def plan(
    step: int,
    *,
    prefills: tuple[int, ...] = (),
    decodes: tuple[int, ...] = (),
    bound: dict[int, int] | None = None,
    restores: tuple[int, ...] = (),
    samples: bool = True,
) -> StepPlan:
    slots = [*decodes, *prefills]
    binds = bound or {}
    return StepPlan(
        step=step,
        decode_count=len(decodes),
        row_slots=np.array(slots, dtype=np.int32),
        query_starts=np.arange(len(slots) + 1, dtype=np.int32),
        context_lens=np.zeros(len(slots), dtype=np.int32),
        token_ids=np.zeros(len(slots), dtype=np.int32),
        sample_rows=np.arange(len(slots) if samples else 0, dtype=np.int32),
        sample_positions=np.zeros(len(slots) if samples else 0, dtype=np.int32),
        bound_slots=np.array(list(binds), dtype=np.int32),
        bound_requests=np.array(list(binds.values()), dtype=np.int64),
        transfers=Transfers(
            ids=np.arange(len(restores), dtype=np.int64),
            requests=np.array(restores, dtype=np.int64),
            kinds=np.full(len(restores), TransferKind.LOAD, dtype=np.int32),
        ),
        groups=(),
    )


def run(ledger: Ledger, made: StepPlan, began_us: int, ended_us: int) -> None:
    ledger.retired(ledger.launched(made, began_us), ended_us, sampled(made))


def sampled(made: StepPlan) -> Int32Array:
    """A token, 5, for each sample."""
    return np.full(len(made.sample_rows), 5, dtype=np.int32)


def test_one_row_that_goes_on_is_booked_as_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def book() -> tuple[list[list[int]], list[int], int, int, list[int]]:
        draw = random.Random(3)
        ledger = Ledger(lambda context: 9_000.0 if context < 40 else 12_000.0)
        ledger.open(1, prompt_count=5, at_us=0, constrained=False)
        run(ledger, plan(0, prefills=(0,), bound={0: 1}), 100, 1_000)
        now_us, step = 1_000, 1
        for _ in range(100):
            now_us += draw.choice((2_000, 5_000, 10_000, 11_000, 13_000, 200_000))
            # Now and then it is left out of a step, and goes on behind it.
            run(ledger, plan(step, decodes=(0,)), now_us - draw.choice((500, 2_000)), now_us)
            step += draw.choice((1, 1, 1, 2))
        spread = ledger.intervals.tolist()
        live = ledger.live(now_us + 50).tolist()
        (times,) = ledger.close([1], now_us + 90).tolist()
        return live, spread, ledger.intervals_us, ledger.floor_violations, times

    alone = book()
    assert alone[3] > 0
    monkeypatch.setattr(Ledger, "_goes_on", lambda ledger, plan, row: False)
    assert book() == alone


def test_each_stretch_of_a_request_s_time_is_booked_once_and_where_it_belongs() -> None:
    ledger = Ledger(lambda context: None)
    ledger.open(7, prompt_count=9, at_us=1_000, constrained=True)
    ledger.queue(7, 1_400)
    run(ledger, plan(0, bound={0: 7}, restores=(7,)), 2_000, 2_300)
    run(ledger, plan(1, prefills=(0,), samples=False), 2_500, 3_000)
    run(ledger, plan(2, prefills=(0,)), 3_100, 4_000)
    run(ledger, plan(3, decodes=(0,)), 4_200, 5_000)
    run(ledger, plan(4), 5_100, 6_000)
    run(ledger, plan(5, decodes=(0,)), 6_500, 7_000)
    (times,) = ledger.close([7], 7_050)
    assert times.tolist()[:PHASES] == [
        400,  # its constraint
        600,  # the queue
        500,  # the restore began with step 0, and step 1 took the request along
        1_500,  # steps 1 and 2, and what is between them
        1_500,  # step 4 did not take it along
        1_550,  # steps 3 and 5, and what came of the last
    ]
    assert times.tolist()[PHASES:] == [4_000, 7_050]
    assert len(ledger) == 0


def test_steps_that_overlap_are_not_booked_twice() -> None:
    ledger = Ledger(lambda context: None)
    ledger.open(1, prompt_count=1, at_us=0, constrained=False)
    first = ledger.launched(plan(0, prefills=(0,), bound={0: 1}), 100)
    second = ledger.launched(plan(1, decodes=(0,)), 200)
    ledger.retired(first, 1_000, sampled(first.plan))
    third = ledger.launched(plan(2, decodes=(0,)), 1_100)
    ledger.retired(second, 2_000, sampled(second.plan))
    (times,) = ledger.close([1], 2_000)
    assert times[:PHASES].tolist() == [0, 100, 0, 900, 0, 1_000]
    # The step under way still names the row, so that the next request gets another.
    ledger.open(2, prompt_count=1, at_us=2_000, constrained=False)
    ledger.retired(third, 3_000, sampled(third.plan))
    (live,) = live_requests(ledger.live(3_500).tolist())
    assert live.times.queue_us == 1_500
    assert live.tokens == 0


def test_intervals_are_counted_by_length_and_against_the_floor() -> None:
    ledger = Ledger(lambda context: 10_000.0 if context < 4 else 30_000.0)
    ledger.open(1, prompt_count=1, at_us=0, constrained=False)
    run(ledger, plan(0, prefills=(0,), bound={0: 1}), 0, 1_000)
    for step, ended_us in enumerate((6_000, 26_000, 46_000), start=1):
        run(ledger, plan(step, decodes=(0,)), ended_us - 4_000, ended_us)
    counts = dict(zip(INTERVAL_BOUNDS_US, ledger.intervals.tolist(), strict=False))
    assert counts[5_000] == 1
    assert counts[20_000] == 2
    assert ledger.intervals.sum() == 3
    assert ledger.intervals_us == 45_000
    # The second is over 10 ms; the third is not over the 30 ms of the longer context.
    assert ledger.floor_violations == 1
    (live,) = live_requests(ledger.live(46_500).tolist())
    assert live.tokens == 4
    assert live.floor_interval_us == 30_000
    assert live.interval_us is not None
    assert 5_000 < live.interval_us < 20_000
    (stuck,) = live_requests(ledger.live(1_046_000).tolist())
    assert stuck.interval_us == 1_000_000


def test_tokens_of_one_step_come_together() -> None:
    ledger = Ledger(lambda context: 5_000.0)
    for request in (1, 2):
        ledger.open(request, prompt_count=1, at_us=0, constrained=False)
    run(ledger, plan(0, prefills=(0, 1), bound={0: 1, 1: 2}), 0, 1_000)
    # Of three guesses the first two are right, so three tokens are sampled that count; of the
    # other request's guess none is.
    made = plan(1, decodes=(0, 1))
    made = replace(
        made,
        query_starts=np.array([0, 4, 6], dtype=np.int32),
        token_ids=np.array([0, 5, 5, 9, 0, 6], dtype=np.int32),
        sample_rows=np.array([0, 0, 0, 0, 1, 1], dtype=np.int32),
        sample_positions=np.array([1, 2, 3, 4, 1, 2], dtype=np.int32),
    )
    assert ledger.take_drafts().tolist() == []
    run(ledger, made, 2_000, 7_000)
    assert ledger.take_drafts().tolist() == [[1, 3, 2], [2, 1, 0]]
    assert ledger.take_drafts().tolist() == []
    counts = dict(zip(INTERVAL_BOUNDS_US, ledger.intervals.tolist(), strict=False))
    assert counts[1_000] == 2
    assert counts[7_000] == 2
    assert ledger.intervals_us == 12_000
    # Three tokens may come after three intervals, one may not after six fifths of one.
    assert ledger.floor_violations == 1
    first, second = live_requests(ledger.live(7_000).tolist())
    assert (first.tokens, first.drafted_tokens, first.accepted_tokens) == (4, 3, 2)
    assert (second.tokens, second.drafted_tokens, second.accepted_tokens) == (2, 1, 0)
    assert (first.interval_us, second.interval_us) == (2_000, 6_000)


def test_the_clock_tells_the_parts_of_steps_and_what_lies_between() -> None:
    clock = StepClock()
    clock.begin(100)
    clock.end(200, busy=True)
    clock.begin(250)
    clock.end(300, busy=False)
    clock.begin(9_000)
    assert clock.messages_us == 50
    clock.book(plan(0, prefills=(0,)), 10)
    clock.book(plan(1, decodes=(0,)), 20)
    clock.book(plan(2, decodes=(0,), prefills=(1,)), 40)
    clock.book(plan(3), 80)
    assert (clock.prefill_us, clock.decode_us, clock.mixed_us) == (10, 20, 40)
    assert (clock.prefill_steps, clock.decode_steps, clock.mixed_steps) == (1, 1, 1)


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_phases_of_every_request_add_up_to_its_time_in_the_engine(overlap_depth: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    config = SchedulerConfig(
        groups=(CacheGroup(pages=24),),
        page_size=4,
        context_max=64,
        slots_max=4,
        step_tokens_max=16,
        overlap_depth=overlap_depth,
    )
    core = EngineCore(
        Scheduler(config), FakeRunner(), eos_token_ids=(), overlap_depth=overlap_depth, seed=0
    )
    sent: dict[int, int] = {}
    ended: dict[int, RequestTimes] = {}
    requests = 60
    while len(ended) < requests:
        if len(sent) < requests and draw.random() < 0.5:
            number = len(sent)
            sent[number] = 1_000 * number + 1
            prompt = np.array([draw.randrange(50) for _ in range(draw.randint(1, 40))], np.int32)
            core.submit(
                Submit(
                    request=number,
                    prompt=prompt.tobytes(),
                    params=SamplingParams(ignore_eos=True),
                    max_new_tokens=draw.randint(1, 20),
                    seed=1,
                    salt=0,
                    priority=draw.randrange(2),
                    tenant=None,
                    sent_us=sent[number],
                )
            )
        if sent and draw.random() < 0.1:
            core.abort(draw.choice(list(sent)))
        outputs = core.step()
        if outputs is not None:
            finished = np.frombuffer(outputs.finished, dtype=np.int64).tolist()
            for number, times in zip(finished, request_times(outputs), strict=True):
                ended[number] = times
    for number, times in ended.items():
        assert times.ended_at_us is not None
        phases = (
            times.constraint_us,
            times.queue_us,
            times.restore_us,
            times.prefill_us,
            times.stall_us,
            times.decode_us,
        )
        assert min(phases) >= 0
        assert sum(phases) == times.ended_at_us - sent[number]
    timing = step_timing(core)
    assert timing.plan_us > 0
    assert timing.prefill_steps + timing.decode_steps + timing.mixed_steps > 0
    assert not len(core.ledger)
