"""Every request ends once, for the right reason, and its pages come back when they may."""

import pytest

from tests.unit.control.worlds import world
from tokenspeed.core.step import FinishReason

DEPTHS = pytest.mark.parametrize("depth", [0, 1])


@DEPTHS
def test_a_stop_token_is_the_last_token(depth: int) -> None:
    w = world(overlap_depth=depth)
    stop = w.submit(1, [3, 1, 4], max_new_tokens=40).expected[5]
    client = w.submit(2, [3, 1, 4], max_new_tokens=40, stop_token_ids=(stop, 999))
    w.drain()
    assert client.finished is FinishReason.STOP
    assert client.output[-1] == stop
    assert stop not in client.output[:-1]


def test_stop_tokens_among_the_first_min_new_tokens_do_not_stop() -> None:
    w = world()
    alone = w.submit(1, [3, 1, 4], max_new_tokens=6).expected
    client = w.submit(2, [3, 1, 4], max_new_tokens=6, min_new_tokens=3, stop_token_ids=alone)
    w.drain()
    assert (client.finished, len(client.output)) == (FinishReason.STOP, 4)


@DEPTHS
def test_the_context_ends_a_request(depth: int) -> None:
    w = world(overlap_depth=depth, context_max=20)
    client = w.submit(1, range(17), max_new_tokens=1000)
    w.drain()
    assert (client.finished, len(client.output)) == (FinishReason.LENGTH, 3)


def test_max_new_tokens_may_be_larger_than_any_context() -> None:
    w = world(context_max=20)
    client = w.submit(1, range(17), max_new_tokens=2**62)
    w.drain()
    assert (client.finished, len(client.output)) == (FinishReason.LENGTH, 3)


def test_a_prompt_larger_than_the_pool_is_rejected() -> None:
    w = world(pages=4, context_max=100)
    client = w.submit(1, range(16), max_new_tokens=4)
    assert w.launch() is None
    assert client.finished is FinishReason.REJECTED
    fits = w.submit(2, range(15), max_new_tokens=1)
    w.drain()
    assert fits.finished is FinishReason.LENGTH


@DEPTHS
def test_a_request_that_fills_the_pool_alone_ends_with_length(depth: int) -> None:
    w = world(pages=4, context_max=100, overlap_depth=depth)
    client = w.submit(1, range(10), max_new_tokens=80)
    waits = w.submit(2, range(5), max_new_tokens=2)
    w.drain()
    assert (client.finished, len(client.output)) == (FinishReason.LENGTH, 7)
    assert waits.finished is FinishReason.LENGTH


def test_under_overlap_the_end_is_told_at_once_and_the_pages_come_back_a_step_later() -> None:
    w = world(overlap_depth=1)
    stop = w.submit(1, [3, 1, 4], max_new_tokens=40).expected[0]
    w.drain()
    client = w.submit(2, [3, 1, 4], max_new_tokens=40, stop_token_ids=(stop,))
    assert w.launch() is not None
    assert w.launch() is not None
    w.commit()
    assert client.finished is FinishReason.STOP
    assert w.scheduler.stats().pages_active == 1, "the step in flight still writes it"
    assert w.launch() is None
    w.commit()
    assert client.output == [stop], "the token sampled after the end was dropped"
    assert w.scheduler.stats().pages_active == 0


def test_aborting_before_the_first_plan_costs_nothing() -> None:
    w = world()
    client = w.submit(1, range(9), max_new_tokens=4)
    w.abort(1)
    assert w.launch() is None
    assert client.finished is FinishReason.ABORT
    assert w.scheduler.stats().pages_free == 64


def test_aborting_a_waiting_request() -> None:
    w = world(slots_max=1)
    w.submit(1, range(9), max_new_tokens=9)
    client = w.submit(2, range(9), max_new_tokens=4)
    w.step()
    w.abort(2)
    w.step()
    assert client.finished is FinishReason.ABORT
    w.drain()


def test_aborting_between_chunks_gives_pages_back_at_the_next_plan() -> None:
    w = world()
    client = w.submit(1, range(50), max_new_tokens=4)
    w.step()
    w.abort(1)
    assert w.launch() is None
    assert client.finished is FinishReason.ABORT
    stats = w.scheduler.stats()
    assert (stats.pages_active, stats.pages_cached) == (0, 4), "what was sealed may serve others"


def test_aborting_a_decoding_request_gives_pages_back_at_the_next_plan() -> None:
    w = world()
    client = w.submit(1, range(6), max_new_tokens=40)
    w.step()
    w.step()
    w.abort(1)
    assert w.launch() is None
    assert client.finished is FinishReason.ABORT
    assert w.scheduler.stats().pages_active == 0


@pytest.mark.parametrize("prompt", [6, 50])
def test_aborting_in_flight_waits_for_the_step(prompt: int) -> None:
    w = world(overlap_depth=1)
    client = w.submit(1, range(prompt), max_new_tokens=40)
    w.launch()
    w.abort(1)
    assert w.launch() is None
    assert client.finished is FinishReason.ABORT
    assert w.scheduler.stats().pages_active > 0
    w.commit()
    assert client.output == []
    assert w.scheduler.stats().pages_active == 0


def test_aborting_twice_or_after_the_end_is_ignored() -> None:
    w = world(overlap_depth=1)
    w.submit(1, range(6), max_new_tokens=40)
    w.launch()
    w.abort(1)
    w.abort(1)
    w.launch()
    w.abort(1)
    w.launch()
    w.commit()
    w.abort(1)
    w.abort(77)
    w.drain()


def test_an_id_is_free_again_once_its_pages_are_back() -> None:
    w = world()
    w.submit(1, range(6), max_new_tokens=1)
    w.drain()
    assert w.submit(1, range(6), max_new_tokens=2).expected
    w.drain()
    assert len(w.clients[1].output) == 2


@DEPTHS
def test_a_scheduler_may_be_dropped_at_any_point(depth: int) -> None:
    """In a debug build a page that is not given back ends the process."""
    for steps in range(6):
        w = world(overlap_depth=depth, slots_max=2)
        for request in range(4):
            w.submit(request, range(20), max_new_tokens=9)
        for _ in range(steps):
            w.launch()
            if len(w.flights) > depth:
                w.commit()
        w.abort(0)
        del w


def test_pages_on_their_way_back_are_waited_for() -> None:
    """Wherever the abort falls, the other request gets all its tokens: `world` checks them."""
    for abort_at in range(40):
        w = world(pages=8, overlap_depth=1)
        w.submit(1, range(50, 55), max_new_tokens=24)
        client = w.submit(2, range(7), max_new_tokens=20)
        for turn in range(abort_at):
            w.launch()
            if len(w.flights) > 1:
                w.commit()
            if turn == abort_at - 1:
                w.abort(1)
        w.drain()
        assert len(client.output) == 20, f"aborted at {abort_at}"
