"""Each request says where its prompt came from, and why the rest did not come from cache."""

from tests.unit.control.worlds import world
from tokenspeed.core.config import CacheGroup
from tokenspeed.core.step import CacheReport


def report(cached: int, evicted: int, unseen: int, tail: int, divergence: int) -> CacheReport:
    return CacheReport(
        cached_tokens=cached,
        evicted_tokens=evicted,
        unseen_tokens=unseen,
        tail_tokens=tail,
        divergence=divergence,
    )


def test_a_new_prompt_was_never_seen_but_for_its_tail() -> None:
    w = world()
    client = w.submit(1, range(14), max_new_tokens=1)
    w.drain()
    assert client.report == report(0, 0, 12, 2, 0)


def test_the_page_of_the_last_token_is_computed_and_no_miss() -> None:
    w = world()
    for request in (1, 2):
        w.submit(request, range(12), max_new_tokens=1)
        w.drain()
    assert w.clients[2].report == report(8, 0, 0, 4, 12)


def test_a_prompt_diverges_at_the_token_that_differs() -> None:
    w = world()
    w.submit(1, range(20), max_new_tokens=1)
    w.drain()
    client = w.submit(2, [*range(10), 50, 51, 52, 53, 54], max_new_tokens=1)
    w.drain()
    assert client.report == report(8, 0, 4, 3, 10)


def test_what_made_room_for_others_is_said_to_be_evicted() -> None:
    w = world(groups=(CacheGroup(pages=8),))
    w.submit(1, range(20), max_new_tokens=1)
    w.drain()
    w.submit(2, range(100, 120), max_new_tokens=1)
    w.drain()
    # Five pages of one and five of the other do not fit in eight.
    client = w.submit(3, [*range(20), 7, 8, 9, 10, 11], max_new_tokens=1)
    w.drain()
    assert client.report is not None
    assert client.report.evicted_tokens == 20 - client.report.cached_tokens >= 4
    assert (client.report.unseen_tokens, client.report.tail_tokens) == (4, 1)
    assert client.report.divergence == 20
    assert w.scheduler.stats().missed_evicted_tokens == client.report.evicted_tokens


def test_a_salt_hides_what_others_have_from_the_request_and_not_from_the_operator() -> None:
    w = world()
    w.submit(1, range(20), max_new_tokens=1, salt=1)
    w.drain()
    before = w.scheduler.stats()
    other = w.submit(2, range(20), max_new_tokens=1, salt=2)
    new = w.submit(3, range(30, 50), max_new_tokens=1, salt=2)
    w.drain()
    assert other.report == new.report == report(0, 0, 16, 4, 0), "both look alike to a tenant"
    stats = w.scheduler.stats()
    assert stats.missed_other_salt_tokens == 16
    assert stats.missed_unseen_tokens - before.missed_unseen_tokens == 16


def test_a_salt_is_no_reason_once_its_content_is_gone() -> None:
    w = world()
    w.submit(1, range(20), max_new_tokens=1, salt=1)
    w.drain()
    w.scheduler.flush_cache()
    w.submit(2, range(20), max_new_tokens=1, salt=2)
    w.drain()
    assert w.scheduler.stats().missed_other_salt_tokens == 0


def test_the_reasons_add_up_to_all_prompts() -> None:
    w = world(groups=(CacheGroup(pages=12),))
    for request in range(12):
        w.submit(request, [*range(4 * (request % 3)), *range(60 + request, 75)], max_new_tokens=2)
        w.drain()
    stats = w.scheduler.stats()
    assert stats.prompt_tokens == (
        stats.cached_tokens
        + stats.missed_evicted_tokens
        + stats.missed_unseen_tokens
        + stats.missed_other_salt_tokens
        + stats.missed_tail_tokens
    )
