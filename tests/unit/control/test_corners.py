"""Corners that exploration and fuzzing came to first."""

import pytest

from tests.unit.control.worlds import world
from tokenspeed.core.config import CacheGroup, CacheGroupKind
from tokenspeed.core.errors import EngineError
from tokenspeed.core.step import FinishReason, Handover


def test_an_abort_does_not_hit_the_next_request_with_the_same_id() -> None:
    w = world()
    w.submit(1, [1, 2, 3], max_new_tokens=1)
    w.launch()
    w.abort(1)  # It waits for the next plan, and by then the request has ended.
    w.commit()
    assert w.clients[1].finished is FinishReason.LENGTH
    w.submit(1, [4, 5, 6], max_new_tokens=2)
    w.drain()
    assert w.clients[1].finished is FinishReason.LENGTH


def test_events_of_a_cache_that_shares_nothing_are_none() -> None:
    w = world(prefix_cache=False)
    w.scheduler.record_cache_events(True)
    w.submit(1, range(1, 12), max_new_tokens=2)
    w.drain()
    assert w.scheduler.take_cache_events() is None


def test_a_parked_request_that_fills_the_pool_ends_when_it_must_give_way() -> None:
    """Its last token has no KV yet: all its tokens together can never be held again."""
    w = world(pages=4, page_size=1, slots_max=1)
    w.submit(1, [1, 2], max_new_tokens=9, priority=1)
    while len(w.clients[1].output) < 3:
        w.step()
    w.submit(2, [3], max_new_tokens=2)
    w.drain()
    assert w.clients[1].finished is FinishReason.LENGTH
    assert len(w.clients[1].output) == 3
    assert w.clients[2].finished is FinishReason.LENGTH
    assert len(w.clients[2].output) == 2


def test_many_may_be_parked_one_after_the_other() -> None:
    """Of a recurrence nothing but checkpoints is kept, yet who is parked knows all it was fed."""
    group = CacheGroup(kind=CacheGroupKind.RECURRENT, pages=12, checkpoint_pages=2)
    w = world(groups=(group,), page_size=1, slots_max=1, step_tokens_max=40, context_max=60)
    for request in range(6):
        w.submit(
            request, range(40 * request, 40 * request + 40), max_new_tokens=9, priority=-request
        )
        while len(w.clients[request].output) < 2:
            w.step()
    w.drain()
    assert all(client.finished is FinishReason.LENGTH for client in w.clients.values())


def test_a_transfer_that_no_plan_has_begun_cannot_be_over() -> None:
    w = world()
    w.submit(1, [1, 2, 3], max_new_tokens=1, handover=Handover.SEND)
    w.launch()
    w.commit()  # The transfer is the next plan's.
    with pytest.raises(EngineError, match="no transfer 0 is under way"):
        w.scheduler.transferred(0, complete=True)
    w.drain()
    assert w.clients[1].sent
