"""Sealed pages are shared by content, outlive their request, and go leaf first, oldest first."""

import numpy as np
import pytest

from tests.unit.control.worlds import world

STORED, REMOVED, CLEARED = 0, 1, 2


def test_a_prompt_finds_the_pages_of_an_equal_one_but_computes_its_last_token() -> None:
    w = world()
    assert w.submit(1, range(8), max_new_tokens=1) is not None
    w.drain()
    again = w.submit(2, range(8), max_new_tokens=1)
    w.drain()
    assert again.cached == 4, "the second page holds the last token, which gives the logits"


@pytest.mark.parametrize(("prompt", "cached"), [(4, 0), (5, 4), (9, 8), (11, 8), (13, 12)])
def test_reuse_covers_every_full_page_before_the_last_token(prompt: int, cached: int) -> None:
    w = world()
    w.submit(1, range(40), max_new_tokens=1)
    w.drain()
    client = w.submit(2, range(prompt), max_new_tokens=1)
    w.drain()
    assert client.cached == cached


def test_the_next_turn_finds_every_full_page_of_the_last() -> None:
    w = world()
    first = w.submit(1, range(10), max_new_tokens=7)
    w.drain()
    # The KV of the last token was never written: 16 of the 17 tokens are in full pages.
    turn = w.submit(2, [*range(10), *first.output, 1, 2, 3], max_new_tokens=3)
    w.drain()
    assert turn.cached == 16


@pytest.mark.parametrize("depth", [0, 1])
def test_overlap_leaves_the_same_pages_behind(depth: int) -> None:
    w = world(overlap_depth=depth)
    first = w.submit(1, range(10), max_new_tokens=50)
    stop = first.expected[6]
    w.submit(2, range(10), max_new_tokens=50, stop_token_ids=(stop,))
    w.abort(1)
    w.drain()
    kept = w.clients[2].prompt.tolist() + w.clients[2].output
    again = w.submit(3, [*kept, 1, 2, 3], max_new_tokens=1)
    w.drain()
    assert again.cached == (len(kept) - 1) // 4 * 4


def test_a_running_request_shares_what_it_has_sealed() -> None:
    w = world()
    w.submit(1, range(30), max_new_tokens=5)
    w.step()
    w.step()
    late = w.submit(2, range(30), max_new_tokens=5)
    w.step()
    assert late.cached == 28
    assert w.scheduler.stats().pages_active == 7 + 1 + 1, "seven shared, and a tail for each"
    w.drain()


@pytest.mark.parametrize("depth", [0, 1])
def test_equal_prompts_that_run_together_end_up_on_the_same_pages(depth: int) -> None:
    w = world(overlap_depth=depth, step_tokens_max=40)
    for request in range(4):
        w.submit(request, range(9), max_new_tokens=20)
    for _ in range(3):
        w.launch()
        while len(w.flights) > depth:
            w.commit()
    w.launch()
    tables = {tuple(w.groups[0].table[slot, :2].tolist()) for slot in range(4)}
    assert len(tables) == 1, "the later ones moved to the pages of the first"
    w.drain()


def test_salts_do_not_share() -> None:
    w = world()
    w.submit(1, range(20), max_new_tokens=1, salt=1)
    w.drain()
    other = w.submit(2, range(20), max_new_tokens=1, salt=2)
    same = w.submit(3, range(20), max_new_tokens=1, salt=1)
    w.drain()
    assert (other.cached, same.cached) == (0, 16)
    largest = w.submit(4, range(20), max_new_tokens=1, salt=2**64 - 1)
    w.drain()
    assert largest.cached == 0


def test_without_the_cache_nothing_is_kept_or_shared() -> None:
    w = world(prefix_cache=False)
    w.submit(1, range(20), max_new_tokens=4)
    w.submit(2, range(20), max_new_tokens=4)
    w.drain()
    assert w.clients[2].cached == 0
    assert w.scheduler.stats().pages_free == 64


def fill(w, base: int, request: int, tokens: int = 9) -> None:
    """Leaves tokens // 4 pages of a prompt of its own behind."""
    w.submit(request, range(base, base + tokens), max_new_tokens=1)
    w.drain()


def test_the_least_recently_used_pages_go_first() -> None:
    w = world(pages=7)
    fill(w, 100, 1)
    fill(w, 200, 2)
    fill(w, 300, 3)  # six pages kept
    fill(w, 100, 4)  # its own again
    fill(w, 400, 5)  # takes two: those of 200
    assert w.scheduler.stats().evictions == 2
    for request, base, cached in [(6, 100, 8), (7, 300, 8), (8, 200, 0)]:
        client = w.submit(request, range(base, base + 9), max_new_tokens=1)
        w.drain()
        assert client.cached == cached, f"prompt {base}"


def test_children_go_before_their_parents() -> None:
    w = world(pages=8)
    fill(w, 0, 1, tokens=17)  # four pages in a row
    fill(w, 100, 2, tokens=21)  # needs six of eight: two free and the last two of the row
    client = w.submit(3, range(17), max_new_tokens=1)
    w.launch()
    w.commit()
    assert client.cached == 8
    w.drain()


def test_a_page_in_use_is_never_evicted() -> None:
    w = world(pages=8, slots_max=2)
    w.submit(1, range(13), max_new_tokens=8)
    w.step()
    fill(w, 100, 2, tokens=9)
    fill(w, 200, 3, tokens=9)
    fill(w, 300, 4, tokens=9)
    assert w.clients[1].finished is not None
    assert w.scheduler.stats().evictions > 0


def test_flush_forgets_what_nobody_uses() -> None:
    w = world()
    fill(w, 0, 1)
    assert w.scheduler.flush_cache()
    assert w.scheduler.stats().pages_free == 64
    w.submit(2, range(9), max_new_tokens=9)
    w.step()
    assert not w.scheduler.flush_cache()
    w.drain()
    assert w.clients[2].cached == 0
    again = w.submit(3, range(9), max_new_tokens=1)
    w.drain()
    assert again.cached == 8, "what was in use outlived the flush"


def test_events_say_what_enters_and_leaves_the_cache() -> None:
    w = world(pages=4)
    scheduler = w.scheduler
    assert scheduler.take_cache_events() is None
    scheduler.record_cache_events(True)
    fill(w, 0, 1)
    stored = scheduler.take_cache_events()
    assert stored.kinds.tolist() == [STORED, STORED]
    assert stored.has_parent.tolist() == [False, True]
    assert stored.parents.tolist() == [0, stored.hashes[0]]
    assert stored.tokens.tolist() == list(range(8))
    fill(w, 100, 2)
    changed = scheduler.take_cache_events()
    assert changed.kinds.tolist() == [REMOVED, STORED, STORED]
    assert changed.hashes[0] == stored.hashes[1], "the leaf goes first"
    scheduler.flush_cache()
    assert scheduler.take_cache_events().kinds.tolist() == [CLEARED]
    scheduler.record_cache_events(False)
    fill(w, 200, 3)
    assert scheduler.take_cache_events() is None


def test_recording_starts_with_what_is_there_parents_first() -> None:
    w = world()
    fill(w, 0, 1, tokens=17)
    w.submit(2, [*range(8), *range(50, 60)], max_new_tokens=1)
    w.drain()
    w.scheduler.record_cache_events(True)
    events = w.scheduler.take_cache_events()
    assert len(events.kinds) == 6
    assert set(events.kinds.tolist()) == {STORED}
    seen: set[int] = set()
    for name, parent, has_parent in zip(
        events.hashes.tolist(), events.parents.tolist(), events.has_parent.tolist(), strict=True
    ):
        assert not has_parent or parent in seen
        seen.add(name)
    assert sorted(events.tokens.tolist()) == sorted([*range(16), *range(50, 58)])


def test_hashes_do_not_depend_on_the_run() -> None:
    """Whoever routes by them compares hashes of several engines."""
    names = []
    for pages in (8, 30):
        w = world(pages=pages)
        w.scheduler.record_cache_events(True)
        fill(w, 0, 1)
        names.append(w.scheduler.take_cache_events().hashes)
    assert (names[0] == names[1]).all()
    assert len(np.unique(names[0])) == 2


def test_hashes_of_two_salts_differ() -> None:
    w = world()
    w.scheduler.record_cache_events(True)
    for request in (1, 2):
        w.submit(request, range(9), max_new_tokens=1, salt=request)
    w.drain()
    assert len(np.unique(w.scheduler.take_cache_events().hashes)) == 4
