"""Cache groups: what each kind keeps, gives back and finds again."""

import pytest

from tests.unit.control.worlds import world
from tokenspeed.core.config import CacheGroup, CacheGroupKind

FULL, WINDOW, LATENT, RECURRENT = CacheGroupKind


def window(pages: int = 24, tokens: int = 8) -> CacheGroup:
    return CacheGroup(kind=WINDOW, pages=pages, window=tokens)


def recurrent(pages: int = 20, checkpoint_pages: int = 2) -> CacheGroup:
    return CacheGroup(kind=RECURRENT, pages=pages, checkpoint_pages=checkpoint_pages)


@pytest.mark.parametrize("depth", [0, 1])
def test_pages_behind_the_window_return_at_once(depth: int) -> None:
    w = world(
        groups=(window(pages=12),), overlap_depth=depth, step_tokens_max=8, prefix_cache=False
    )
    w.submit(1, range(60), max_new_tokens=20)
    held = []
    while w.live:
        planned = w.launch() is not None
        if w.flights and (not planned or len(w.flights) > depth):
            w.commit()
        held.append(w.scheduler.stats().pages_active)
    w.drain()
    # The window, a chunk for each step in flight, and a page begun at either end.
    assert max(held) <= (8 + 8 * (depth + 1)) // 4 + 2
    assert w.scheduler.stats().retractions == 0


def test_a_prompt_is_found_again_while_the_window_before_its_end_is_there() -> None:
    w = world(groups=(CacheGroup(pages=64), window(pages=12)))
    first = w.submit(1, range(40), max_new_tokens=2)
    w.drain()
    again = w.submit(2, [*range(40), *first.output, 50, 51], max_new_tokens=2)
    w.drain()
    assert again.cached == 40
    # A fork far behind the end: its pages are all there, but the window before it is long gone.
    w.submit(3, range(100, 160), max_new_tokens=2)
    w.drain()
    fork = w.submit(4, [*range(16), 60, 61, 62], max_new_tokens=2)
    w.drain()
    assert fork.cached == 0


def test_a_recurrence_goes_on_from_a_kept_state_only() -> None:
    w = world(groups=(CacheGroup(pages=64), recurrent(checkpoint_pages=3)))
    w.submit(1, range(34), max_new_tokens=1)
    w.drain()
    # States are kept after 12 and 24 tokens, and at the prompt's last full page, after 32.
    found = {}
    for request, common in enumerate([33, 32, 31, 24, 23, 13, 11], start=2):
        client = w.submit(request, [*range(common), 60 + request, 9], max_new_tokens=1)
        w.drain()
        found[common] = client.cached
    assert found == {33: 32, 32: 32, 31: 24, 24: 24, 23: 12, 13: 12, 11: 0}


def test_a_recurrence_holds_one_page_whatever_its_length() -> None:
    w = world(groups=(recurrent(pages=3),), prefix_cache=False)
    w.submit(1, range(50), max_new_tokens=30)
    w.submit(2, range(70, 110), max_new_tokens=30)
    while w.step():
        assert w.scheduler.stats().pages_active <= 2
    w.drain()


def test_every_group_has_to_serve_what_is_reused() -> None:
    w = world(groups=(CacheGroup(pages=64), window(), recurrent(checkpoint_pages=1)))
    w.submit(1, range(30), max_new_tokens=1)
    w.drain()
    again = w.submit(2, range(30), max_new_tokens=1)
    w.drain()
    assert again.cached == 28


def test_latent_pages_are_reused_as_full_ones_are() -> None:
    w = world(groups=(CacheGroup(kind=LATENT, pages=40),))
    w.submit(1, range(30), max_new_tokens=1)
    w.drain()
    again = w.submit(2, [*range(21), 99], max_new_tokens=1)
    w.drain()
    assert again.cached == 20
