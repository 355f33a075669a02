"""Turns: tenants get even shares of the tokens, and within a tenant it is arrival order."""

import random

import pytest

from tests.scenario.simulation import i32
from tests.unit.control.clocked import Machine

LONG, SHORT = 1, 2


def flood(machine: Machine, *, tenant: int) -> list[int]:
    """The times to the first token of short prompts beside forty long ones of another tenant."""
    for request in range(40):
        machine.submit(request, 20_000, 50, tenant=LONG)
    shorts = range(100, 110)
    for request in shorts:
        machine.steps(10)
        machine.submit(request, 400, 20, tenant=tenant)
    machine.run_until(*range(40), *shorts)
    return [machine.first[request] for request in shorts]


@pytest.mark.parametrize("floor", [None, 100.0])
def test_long_prompts_of_one_tenant_do_not_starve_another(floor: float | None) -> None:
    sizes = {"pages": 60_000, "slots_max": 24, "tps_floor": floor}
    alike, apart = Machine(**sizes), Machine(**sizes)
    waits_in_line = flood(alike, tenant=LONG)
    waits_apart = flood(apart, tenant=SHORT)
    assert max(waits_apart) < 200_000, "two steps, whatever the other has queued"
    assert min(waits_in_line) > 10 * max(waits_apart)
    assert apart.now_us == pytest.approx(alike.now_us, rel=0.05), "it costs the others nothing"


def test_tenants_that_ask_for_all_they_can_get_even_shares() -> None:
    machine = Machine(slots_max=4)
    sizes = {0: (500, 30), 1: (2000, 30), 2: (8000, 30)}
    for number in range(200):
        for tenant, (tokens, outputs) in sizes.items():
            machine.submit(10 * number + tenant, tokens, outputs, tenant=tenant)
    machine.steps(1500)
    given = [
        sum(sum(sizes[tenant]) for request, _ in machine.first.items() if request % 10 == tenant)
        for tenant in sizes
    ]
    assert max(given) < 1.2 * min(given)


def test_within_a_tenant_the_order_is_arrival_order() -> None:
    machine = Machine(slots_max=2)
    rng = random.Random(6)
    for request in range(60):
        machine.submit(request, rng.randrange(10, 4000), 8, tenant=request % 4)
    bound: list[int] = []
    while len(machine.finished) < 60:
        plan = machine.step()
        bound += [] if plan is None else plan.bound_requests.tolist()
    for tenant in range(4):
        own = [request for request in bound if request % 4 == tenant]
        assert own == sorted(own)


def test_a_more_urgent_request_goes_before_a_tenant_that_was_served_less() -> None:
    machine = Machine(slots_max=1)
    machine.submit(0, 5000, 5, tenant=LONG)
    machine.step()
    machine.submit(1, 10, 1, tenant=SHORT, priority=1)
    machine.submit(2, 5000, 5, tenant=LONG, priority=0)
    machine.run_until(0, 1, 2)
    assert machine.first[2] < machine.first[1]


def test_a_pause_saves_up_no_turns() -> None:
    """A tenant that comes late shares from then on, and does not first catch up."""
    machine = Machine(slots_max=1)
    for number in range(30):
        machine.submit(number, 2000, 1, tenant=1)
    machine.run_until(*range(10))
    for number in range(100, 110):
        machine.submit(number, 2000, 1, tenant=2)
    bound: list[int] = []
    while len(machine.finished) < 40:
        plan = machine.step()
        bound += [] if plan is None else plan.bound_requests.tolist()
    assert sum(request >= 100 for request in bound[:10]) in (5, 6)


def test_a_newcomer_owes_nothing_to_those_who_leave_before_it_waits() -> None:
    """It starts level with whoever was there when it came, also if they come back only later."""
    machine = Machine(slots_max=1)
    machine.submit(0, 2000, 1, tenant=1)
    plan = machine.scheduler.plan(machine.now_us)
    assert plan is not None
    for request in (10, 11, 12):
        machine.submit(request, 100, 1, tenant=2)
    machine.scheduler.commit(plan.step, i32(7), machine.now_us)  # Tenant 1 has left by now.
    bound: list[int] = []
    while len(bound) < 4:
        plan = machine.step()
        bound += [] if plan is None else plan.bound_requests.tolist()
        if bound == [10]:
            machine.submit(1, 100, 1, tenant=1)
    assert bound == [10, 11, 1, 12], "tenant 1 does not wait until the other has had 2000 tokens"


def test_whoever_starts_when_all_have_gone_starts_like_everybody() -> None:
    machine = Machine(slots_max=1)
    machine.submit(0, 50_000, 1, tenant=1)
    machine.run_until(0)
    machine.submit(1, 100, 1, tenant=1)
    machine.submit(2, 100, 1, tenant=2)
    plan = machine.step()
    assert plan is not None
    assert plan.bound_requests.tolist() == [1], "what it had long ago does not count against it"


def test_ids_and_the_numbers_of_tenants_do_not_matter() -> None:
    def steps(ids: list[int], tenants: list[int]) -> list[tuple[list[int], list[int]]]:
        machine = Machine(slots_max=6, tps_floor=100.0)
        rng = random.Random(8)
        for index, request in enumerate(ids):
            # The prompts of a clocked machine follow from the id, but none shares a page.
            tokens, outputs = rng.randrange(1, 3000), rng.randrange(1, 40)
            machine.submit(request, tokens, outputs, tenant=tenants[index % len(tenants)])
        return [
            (plan.query_starts.tolist(), plan.context_lens.tolist()) for plan in machine.steps(400)
        ]

    shuffled = list(range(1000, 1050))
    random.Random(9).shuffle(shuffled)
    assert steps(list(range(50)), [1, 2, 3]) == steps(shuffled, [2**63, 7, 5])


def test_more_tenants_than_are_remembered_leave_the_scheduler_sound() -> None:
    machine = Machine(slots_max=8)
    for number in range(1500):
        machine.submit(number, 10, 1, tenant=number, priority=number % 2)
        if number % 3 == 0:
            machine.step()
    machine.run_until(*range(1500))
    machine.scheduler.audit()
