"""When pages run out the last in order gives way, comes back, and loses nothing but time."""

import pytest

from tests.unit.control.worlds import world
from tokenspeed.core.step import FinishReason

DEPTHS = pytest.mark.parametrize("depth", [0, 1])


@DEPTHS
def test_the_youngest_gives_way_and_everybody_ends(depth: int) -> None:
    w = world(pages=12, context_max=60, overlap_depth=depth)
    clients = [w.submit(r, [r, r, r, r, r], max_new_tokens=30) for r in range(3)]
    bound = []
    while w.live:
        plan = w.launch()
        if plan is not None:
            bound += plan.bound_requests.tolist()
        if w.flights and (plan is None or len(w.flights) > depth):
            w.commit()
    w.drain()
    assert w.scheduler.stats().retractions >= 1
    assert bound.count(0) == 1, "the eldest is never sent away"
    assert bound.count(2) >= 2
    assert all(c.finished is FinishReason.LENGTH and len(c.output) == 30 for c in clients)


def test_the_less_urgent_gives_way_before_the_younger() -> None:
    w = world(pages=12, context_max=60)
    bound = []
    for request, priority in [(0, 1), (1, 0), (2, 0)]:
        w.submit(request, [request] * 5, max_new_tokens=30, priority=priority)
    while w.live:
        bound += w.step().bound_requests.tolist()
    assert bound.count(0) >= 2
    assert bound.count(1) == 1


def test_a_retracted_request_finds_its_sealed_pages_again() -> None:
    w = world(pages=12, context_max=60)
    for request in range(3):
        w.submit(request, [request] * 5, max_new_tokens=30)
    while w.scheduler.stats().retractions == 0:
        w.step()
    w.abort(0)
    w.abort(1)
    plan = w.step()
    assert plan.bound_requests.tolist() == [2]
    assert plan.context_lens[0] >= 8, "what nobody took meanwhile was still there"
    assert plan.sample_positions.tolist() == [len(w.clients[2].output) - 1], "it goes on"
    w.drain()


def test_the_count_of_cached_tokens_is_that_of_the_first_admission() -> None:
    w = world(pages=12, context_max=60)
    clients = [w.submit(r, [r] * 5, max_new_tokens=30) for r in range(3)]
    w.drain()
    assert w.scheduler.stats().retractions >= 1
    assert [c.cached for c in clients] == [0, 0, 0]


def test_a_crowded_pool_does_not_thrash() -> None:
    w = world(pages=40, slots_max=16, context_max=100, step_tokens_max=64)
    for request in range(40):
        w.submit(request, [request] * 7, max_new_tokens=60)
    w.keep_plans = True
    w.drain()
    ran = sum(len(plan.token_ids) for plan in w.plans)
    assert ran < 1.4 * 40 * (7 + 59), "little is done twice, though two in forty fit"


def test_admission_leaves_a_page_for_each_that_runs() -> None:
    w = world(pages=10, context_max=60)
    w.submit(0, range(20), max_new_tokens=10)
    w.step()
    w.step()
    w.submit(1, range(100, 116), max_new_tokens=10)
    w.step()
    assert w.scheduler.stats().waiting == 1, "4 pages of 5 would leave too few"
    w.submit(2, [5], max_new_tokens=1, priority=-1)
    w.drain()


def test_a_request_brought_back_is_not_sent_away_before_it_made_progress() -> None:
    """More urgent ones take its pages once; then they wait for its first token."""
    w = world(pages=16, slots_max=3, step_tokens_max=3, context_max=60)
    for request in (1, 2):
        w.submit(request, [request] * 3, max_new_tokens=30)
    w.step()
    w.step()
    long = w.submit(0, range(28), max_new_tokens=2, priority=1)
    while len(long.stays) < 2:
        w.step()
    assert long.stays == [0, 0], "sent away before its first token"
    for request in (3, 4):
        w.submit(request, [request] * 3, max_new_tokens=40)
    waiting_in = []
    while not long.output:
        rows = len(w.step().row_slots)
        stats = w.scheduler.stats()
        starves = stats.pages_free + stats.pages_cached == 0 and rows < stats.running
        waiting_in += [stats.running] if starves else []
    assert 3 in waiting_in, "who wants its pages waits in its slot, and is not sent away instead"
    assert len(long.stays) == 2
    w.drain()
