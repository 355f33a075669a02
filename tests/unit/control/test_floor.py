"""The floor: users who decode keep their pace, and prompts come on all the same."""

from tests.unit.control.clocked import Machine, p99
from tokenspeed.core.step import StepWork

USERS = range(8)


def users_decode(machine: Machine, tokens: int = 5000) -> None:
    machine.warm()
    for user in USERS:
        machine.submit(user, tokens, 3000)
    while not all(user in machine.first for user in USERS):
        machine.step()
    machine.steps(50)


def arrival(machine: Machine, tokens: int) -> int:
    """The worst p99 of any user while a long prompt is computed."""
    for user in USERS:
        machine.intervals[user].clear()
    machine.submit(99, tokens, 1)
    machine.run_until(99)
    return max(p99(machine.intervals[user]) for user in USERS)


def test_users_keep_the_floor_while_a_long_prompt_arrives() -> None:
    machine = Machine(noise=0.04, tps_floor=100.0)
    users_decode(machine)
    worst_us = arrival(machine, 64_000)
    assert machine.scheduler.interval_bound_us(6000) == 10_000
    assert worst_us <= 10_000
    assert machine.first[99] < 12_000_000, "most of the time under the floor goes to the prompt"


def test_without_a_floor_they_do_not() -> None:
    machine = Machine(noise=0.04)
    users_decode(machine)
    assert arrival(machine, 64_000) > 30_000
    assert machine.scheduler.interval_bound_us(6000) is None


def test_prompts_are_computed_at_full_size_while_nobody_decodes() -> None:
    machine = Machine(tps_floor=300.0)
    machine.warm()
    machine.submit(0, 6000, 1)
    plan = machine.step()
    assert plan is not None
    assert len(plan.token_ids) == 2048


def test_a_user_too_many_waits_until_one_has_ended() -> None:
    machine = Machine(tps_floor=270.0, slots_max=40)
    machine.warm()
    for user in range(40):
        machine.submit(user, 20, 400)
    machine.steps(200)
    stats = machine.scheduler.stats()
    work = StepWork(decode_rows=stats.running, context_tokens=300 * stats.running)
    assert stats.waiting > 0
    bound_us = machine.scheduler.interval_bound_us(300)
    assert bound_us is not None
    assert machine.time_us(work) <= bound_us
    assert stats.running > 10, "as many as the floor has room for"
    machine.run_until(*range(40))


def test_where_one_user_alone_is_too_slow_ninety_percent_of_that_is_held() -> None:
    machine = Machine(tps_floor=10_000.0)
    machine.warm()
    alone_us = machine.time_us(StepWork(decode_rows=1, context_tokens=1000))
    bound_us = machine.scheduler.interval_bound_us(1000)
    assert bound_us is not None
    assert alone_us / 0.9 <= bound_us < 1.1 * alone_us / 0.9
    for user in range(20):
        machine.submit(user, 100, 500)
    machine.steps(200)
    worst_us = max(max(times) for times in machine.intervals.values())
    assert machine.scheduler.stats().running > 1
    assert worst_us <= bound_us * 1.01


def test_prompts_come_on_even_where_the_floor_leaves_no_room() -> None:
    """Decode rows have become dear, so that those who run break the floor by themselves."""
    machine = Machine(tps_floor=300.0)
    machine.warm()
    for user in range(4):
        machine.submit(user, 200, 4000)
    machine.steps(20)
    assert len(machine.first) == 4
    machine.submit(99, 400, 1)
    machine.steps(5)
    machine.row_us = 1000.0
    machine.steps(50)
    before = machine.prefilled
    chunks = [len(plan.token_ids) - plan.decode_count for plan in machine.steps(400)]
    assert machine.prefilled - before > 0
    assert sorted(set(chunks)) == [0, 32], "a page at a time"
    assert sum(chunk > 0 for chunk in chunks) == 3, "in one step of 128"


def test_a_prompt_far_in_is_known_to_read_its_context_before_any_of_its_kind_was_seen() -> None:
    machine = Machine(tps_floor=50.0)
    machine.context_token_us = 0.15
    machine.warm()
    machine.submit(99, 60_000, 1)
    machine.run_until(99)
    for user in range(2):
        machine.submit(user, 5000, 3000)
    machine.steps(50)
    for user in range(2):
        machine.intervals[user].clear()
    # All but its last 2,000 tokens are in cache: reading them takes 9 of the 20 ms.
    machine.submit(100, 60_000, 1, like=99, shared=58_000)
    machine.run_until(100)
    assert machine.scheduler.interval_bound_us(6000) == 20_000
    assert max(max(machine.intervals[user]) for user in range(2)) <= 20_000


def test_the_same_calls_at_the_same_times_give_the_same_plans() -> None:
    def plans() -> list[list[int]]:
        machine = Machine(noise=0.1, seed=5, tps_floor=100.0, queue_timeout_us=3_000_000)
        for request in range(30):
            machine.submit(request, 100 + 700 * (request % 7), 60, tenant=request % 3)
        return [plan.query_starts.tolist() for plan in machine.steps(300)]

    assert plans() == plans()
