"""Twice as much asked of the pool as it holds: little is done twice, and nothing is lost."""

import random

import pytest

from tests.unit.control.clocked import Machine
from tokenspeed.core.step import FinishReason

USERS_THAT_FIT = 16
REQUESTS = 160


def sizes(kind: str) -> list[tuple[int, int]]:
    """Tokens and outputs of each request."""
    rng = random.Random(11)
    outputs = {"alike": [300], "mixed": [20, 100, 300, 900]}[kind]
    return [(rng.randrange(100, 1500), rng.choice(outputs)) for _ in range(REQUESTS)]


def serve(kind: str, load: float) -> tuple[Machine, float]:
    """A closed loop of `load` times as many users as fit; the machine and its tokens a second."""
    requests = sizes(kind)
    mean = sum((tokens + outputs) // 32 + 1 for tokens, outputs in requests) / REQUESTS
    users = int(USERS_THAT_FIT * load)
    machine = Machine(pages=int(mean * USERS_THAT_FIT), slots_max=users)
    sent = 0
    while len(machine.finished) < REQUESTS:
        while sent < REQUESTS and sent - len(machine.finished) < users:
            machine.submit(sent, *requests[sent])
            sent += 1
        machine.step()
    machine.scheduler.audit()
    assert set(machine.finished.values()) == {FinishReason.LENGTH}
    return machine, sum(outputs for _, outputs in requests) / machine.now_us * 1e6


@pytest.mark.parametrize("kind", ["alike", "mixed"])
def test_twice_the_load_keeps_the_throughput_and_everybody_finishes(kind: str) -> None:
    peak = max(serve(kind, load)[1] for load in (0.75, 1.0, 1.25))
    machine, crowded = serve(kind, 2.0)
    assert crowded > 0.9 * peak
    asked = sum(tokens for tokens, _ in sizes(kind))
    assert machine.prefilled < 1.1 * asked, "little is computed twice"


def test_long_answers_are_given_room_before_they_ask_for_it() -> None:
    """Once answers are known to be long, requests are admitted only as room for them will be."""
    machine = Machine(pages=200, slots_max=32)
    for request in range(20):
        machine.submit(request, 40, 600)
    machine.run_until(*range(20))
    early = machine.scheduler.stats().retractions
    for request in range(20, 60):
        machine.submit(request, 40, 600)
    machine.run_until(*range(20, 60))
    late = machine.scheduler.stats().retractions - early
    assert late <= 2


def test_the_one_that_costs_least_for_the_room_it_gives_goes() -> None:
    """The youngest shares most of its pages with the eldest: sending it away would free few."""
    machine = Machine(pages=70, slots_max=3)
    machine.submit(0, 900, 2000)
    machine.step()
    machine.submit(1, 700, 2000)
    machine.submit(2, 700, 2000, like=0)
    machine.step()
    assert machine.scheduler.stats().running == 3
    while machine.scheduler.stats().retractions == 0:
        machine.step()
    machine.scheduler.abort(0)
    machine.scheduler.abort(2)
    plan = machine.step()
    assert plan is not None
    assert plan.bound_requests.tolist() == [1], "so it was the other one"
