"""The host's tier: what leaves the device comes back from there."""

import pytest

from tests.scenario.simulation import Simulation
from tests.unit.control.worlds import world
from tokenspeed.core.config import CacheGroup


def crowded(pages: int = 12, **changes: int) -> Simulation:
    """The device holds one conversation, the host all."""
    return world(groups=(CacheGroup(pages=pages, host_pages=60),), context_max=48, **changes)


@pytest.mark.parametrize("depth", [0, 1])
def test_what_left_the_device_is_loaded_and_not_computed(depth: int) -> None:
    w = crowded(overlap_depth=depth)
    for request in range(3):
        w.submit(request, range(40 * request, 40 * request + 36), max_new_tokens=2)
        w.drain()
    again = w.submit(9, range(36), max_new_tokens=2)
    w.drain()
    stats = w.scheduler.stats()
    assert again.cached == 32
    # The end of it left the device last in its turn, and some of its beginning may still be there.
    assert 0 < stats.loads <= 8
    assert stats.stores >= stats.loads


def test_others_go_on_while_one_loads() -> None:
    w = crowded(pages=20)
    for request in range(3):
        w.submit(request, range(40 * request, 40 * request + 36), max_new_tokens=2)
        w.drain()
    w.submit(3, [7], max_new_tokens=12)
    w.step()
    loading = w.submit(4, range(36), max_new_tokens=2)
    w.step()
    (transfer,) = w.transfers
    for _ in range(3):
        plan = w.step()
        assert plan is not None and plan.decode_count == 1
    assert not loading.output
    w.transfer(transfer)
    w.drain()
    assert loading.cached == 32


def test_a_load_that_fails_is_computed() -> None:
    w = crowded()
    for request in range(2):
        w.submit(request, range(40 * request, 40 * request + 36), max_new_tokens=2)
        w.drain()
    again = w.submit(9, range(36), max_new_tokens=2)
    w.launch()
    w.commit()
    (transfer,) = w.transfers
    w.transfer(transfer, complete=False)
    w.drain()
    assert again.output == again.expected
    assert w.scheduler.stats().transferring == 0


def test_a_request_that_ends_while_it_loads_holds_its_pages_until_the_load_is_over() -> None:
    w = crowded()
    for request in range(2):
        w.submit(request, range(40 * request, 40 * request + 36), max_new_tokens=2)
        w.drain()
    w.submit(9, range(36), max_new_tokens=2)
    w.launch()
    w.commit()
    (transfer,) = w.transfers
    w.abort(9)
    assert w.launch() is None
    assert 9 not in w.live
    held = w.scheduler.stats().pages_active
    assert held > 0
    w.transfer(transfer)
    w.launch()
    assert w.scheduler.stats().pages_active == 0


def test_content_that_is_lost_on_every_tier_takes_what_continues_it_along() -> None:
    w = world(groups=(CacheGroup(pages=12, host_pages=4),), context_max=48)
    for request in range(6):
        w.submit(request, range(40 * request, 40 * request + 36), max_new_tokens=2)
        w.drain()
    stats = w.scheduler.stats()
    assert stats.host_pages_cached <= stats.host_pages_total == 4
    again = w.submit(9, range(36), max_new_tokens=2)
    w.drain()
    assert again.output == again.expected
