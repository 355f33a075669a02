"""The model of step times: what steps taught it, and that nothing odd unsettles it."""

import random

import pytest

from tests.unit.control.clocked import Machine
from tokenspeed.core.step import StepWork


def law(work: StepWork) -> float:
    return (
        5000.0
        + 40.0 * work.prefill_tokens
        + 100.0 * work.decode_rows
        + 0.02 * work.context_tokens
        + 0.0005 * work.prefill_pairs
    )


def some_work(rng: random.Random, *, decodes: bool = True, prefills: bool = True) -> StepWork:
    rows = rng.randrange(1, 33) if decodes else 0
    chunk = rng.randrange(1, 1024) if prefills else 0
    context = rng.randrange(20_000)
    return StepWork(
        prefill_tokens=chunk,
        decode_rows=rows,
        context_tokens=rows * rng.randrange(100, 30_000) + (context if prefills else 0),
        prefill_pairs=chunk * (context + chunk / 2),
    )


def teach(machine: Machine, rng: random.Random, steps: int, *, times: float = 1.0) -> None:
    for index in range(steps):
        work = some_work(rng, decodes=index % 3 != 0, prefills=index % 3 != 1)
        took_us = law(work) * times * rng.lognormvariate(0.0, 0.03)
        machine.scheduler.observe(work, int(took_us))


def worst_error(machine: Machine, rng: random.Random, *, times: float = 1.0) -> float:
    works = [some_work(rng, decodes=i % 3 != 0, prefills=i % 3 != 1) for i in range(60)]
    return max(abs(machine.scheduler.predict_us(work) / (times * law(work)) - 1) for work in works)


def test_it_learns_what_each_part_of_a_step_costs() -> None:
    machine, rng = Machine(), random.Random(1)
    teach(machine, rng, 300)
    assert worst_error(machine, rng) < 0.1


def test_before_any_step_it_says_nothing_and_after_one_it_is_sane() -> None:
    machine = Machine()
    work = StepWork(prefill_tokens=500, prefill_pairs=125_000.0)
    assert machine.scheduler.predict_us(work) == 0
    machine.scheduler.observe(work, 25_000)
    assert machine.scheduler.predict_us(work) == pytest.approx(25_000, rel=0.05)
    half = StepWork(prefill_tokens=250, prefill_pairs=31_250.0)
    assert 5_000 < machine.scheduler.predict_us(half) < 25_000
    decode = StepWork(decode_rows=1, context_tokens=100)
    assert 0 < machine.scheduler.predict_us(decode) < 25_000, "it stands in for what was not seen"


def test_no_work_is_ever_predicted_to_take_negative_time() -> None:
    for seed in range(20):
        print(f"seed {seed}")
        machine, rng = Machine(), random.Random(seed)
        for _ in range(60):
            machine.scheduler.observe(some_work(rng), rng.randrange(1, 10**6))
            for work in (
                StepWork(),
                StepWork(prefill_tokens=1),
                StepWork(decode_rows=1),
                StepWork(context_tokens=1),
                StepWork(prefill_pairs=1.0),
            ):
                assert machine.scheduler.predict_us(work) >= 0


def test_a_step_that_was_held_up_changes_little() -> None:
    machine, rng = Machine(), random.Random(2)
    teach(machine, rng, 300)
    for _ in range(3):
        machine.scheduler.observe(some_work(rng), 10**8)
        teach(machine, rng, 20)
    assert worst_error(machine, rng) < 0.2


def test_a_machine_that_became_slower_is_learned_again() -> None:
    machine, rng = Machine(), random.Random(3)
    teach(machine, rng, 300)
    teach(machine, rng, 150, times=5.0)
    assert worst_error(machine, rng, times=5.0) < 0.2


def test_the_price_of_prompts_is_remembered_while_everybody_decodes() -> None:
    machine, rng = Machine(), random.Random(4)
    teach(machine, rng, 300)
    for _ in range(3000):
        work = some_work(rng, prefills=False)
        machine.scheduler.observe(work, int(law(work) * rng.lognormvariate(0.0, 0.03)))
    assert worst_error(machine, rng) < 0.15


def test_time_that_stands_still_or_runs_backwards_teaches_nothing() -> None:
    machine, rng = Machine(), random.Random(5)
    teach(machine, rng, 100)
    work = some_work(rng)
    before = machine.scheduler.predict_us(work)
    machine.scheduler.observe(work, 0)
    machine.scheduler.observe(work, -5)
    assert machine.scheduler.predict_us(work) == before


def test_steps_that_are_planned_and_committed_teach_it_too() -> None:
    machine = Machine()
    machine.warm()
    work = StepWork(decode_rows=4, context_tokens=3000)
    assert machine.scheduler.predict_us(work) == pytest.approx(machine.time_us(work), rel=0.1)


def test_time_between_requests_is_no_part_of_a_step() -> None:
    machine = Machine()
    machine.warm()
    for request in range(6):
        machine.now_us += 60_000_000
        machine.submit(request, 100, 4)
        machine.run_until(request)
    work = StepWork(decode_rows=1, context_tokens=100)
    assert machine.scheduler.predict_us(work) < 4_000


def test_a_drafted_token_costs_a_row_before_any_was_seen_and_then_what_it_takes() -> None:
    machine, rng = Machine(), random.Random(6)
    teach(machine, rng, 300)
    predict_us = machine.scheduler.predict_us
    four = StepWork(decode_rows=4, context_tokens=3000)
    five = StepWork(decode_rows=5, context_tokens=3000)
    drafted = StepWork(decode_rows=4, draft_tokens=10, context_tokens=3000)
    row_us = predict_us(five) - predict_us(four)
    assert predict_us(drafted) - predict_us(four) == pytest.approx(10 * row_us)
    for _ in range(100):
        work = StepWork(
            decode_rows=rng.randrange(1, 30),
            draft_tokens=rng.randrange(1, 40),
            context_tokens=rng.randrange(30_000),
        )
        took_us = int(law(work) + 30 * work.draft_tokens)
        machine.scheduler.observe(work, took_us)
    assert predict_us(drafted) - predict_us(four) == pytest.approx(300, rel=0.2)


def test_a_pass_of_the_draft_model_is_an_eighth_of_a_step_before_any_was_seen() -> None:
    machine, rng = Machine(), random.Random(7)
    teach(machine, rng, 300)
    predict_us = machine.scheduler.predict_us
    row = StepWork(decode_rows=1)
    three = StepWork(decode_rows=1, proposed_tokens=3, proposal_rounds=3)
    assert predict_us(three) == pytest.approx(predict_us(row) * (1 + 3 / 8), rel=1e-3)


def test_passes_and_tokens_of_the_draft_model_are_learned_apart() -> None:
    machine, rng = Machine(), random.Random(8)
    teach(machine, rng, 300)
    predict_us = machine.scheduler.predict_us
    for _ in range(150):
        rows, rounds = rng.randrange(1, 30), rng.randrange(1, 8)
        work = StepWork(
            decode_rows=rows,
            proposed_tokens=rounds + rng.randrange(rows * rounds),
            proposal_rounds=rounds,
            context_tokens=rng.randrange(30_000),
        )
        took_us = law(work) + 300 * work.proposal_rounds + 15 * work.proposed_tokens
        machine.scheduler.observe(work, int(took_us))
    rows = StepWork(decode_rows=8, context_tokens=3000)
    for tokens, rounds in ((4, 4), (32, 4), (8, 1)):
        work = StepWork(
            decode_rows=8, proposed_tokens=tokens, proposal_rounds=rounds, context_tokens=3000
        )
        more_us = predict_us(work) - predict_us(rows)
        assert more_us == pytest.approx(300 * rounds + 15 * tokens, rel=0.15)
