"""A more urgent request takes a slot; who had it keeps its pages."""

import pytest

from tests.unit.control.worlds import world


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_urgent_request_does_not_wait_for_a_slot(depth: int) -> None:
    w = world(slots_max=2, overlap_depth=depth)
    slow = [w.submit(request, range(request, request + 9), max_new_tokens=40) for request in (1, 2)]
    for _ in range(4):
        w.launch()
        while len(w.flights) > depth:
            w.commit()
    urgent = w.submit(3, range(30, 40), max_new_tokens=3, priority=-1)
    for _ in range(4 * (depth + 1)):
        w.launch()
        while len(w.flights) > depth:
            w.commit()
    assert len(urgent.output) > 0
    assert sum(client.finished is None for client in slow) == 2
    w.drain()
    stats = w.scheduler.stats()
    assert (stats.parkings, stats.retractions) == (1, 0)


def test_a_parked_request_keeps_its_pages_and_computes_nothing_again() -> None:
    w = world(slots_max=1)
    w.keep_plans = True
    w.submit(1, range(9), max_new_tokens=12)
    for _ in range(4):
        w.step()
    w.submit(2, range(30, 40), max_new_tokens=3, priority=-1)
    w.step()
    stats = w.scheduler.stats()
    assert (stats.parked, stats.running) == (1, 1)
    assert stats.pages_active >= 3 + 3
    w.drain()
    fed = sum(len(plan.token_ids) for plan in w.plans)
    # Each prompt once, each sampled token but the last of each once: parking costs nothing.
    assert fed == 9 + 11 + 10 + 2


def test_an_equally_urgent_request_waits() -> None:
    w = world(slots_max=1)
    w.submit(1, range(9), max_new_tokens=12)
    w.step()
    w.submit(2, range(30, 40), max_new_tokens=3)
    w.step()
    assert w.scheduler.stats().parked == 0
    w.drain()


def test_a_parked_request_gives_its_pages_to_the_one_it_made_room_for() -> None:
    w = world(slots_max=1, pages=8)
    parked = w.submit(1, range(17), max_new_tokens=12)
    for _ in range(3):
        w.step()
    urgent = w.submit(2, range(30, 50), max_new_tokens=3, priority=-1)
    w.drain()
    assert w.scheduler.stats().retractions == 1
    assert (parked.output, urgent.output) == (parked.expected, urgent.expected)


def test_a_parked_request_can_be_aborted() -> None:
    w = world(slots_max=1)
    w.submit(1, range(9), max_new_tokens=12)
    for _ in range(3):
        w.step()
    w.submit(2, range(30, 40), max_new_tokens=30, priority=-1)
    w.step()
    w.abort(1)
    w.step()
    assert 1 not in w.live
    w.drain()
