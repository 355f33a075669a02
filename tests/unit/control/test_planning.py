"""What a step runs, and how the plan says it."""

import dataclasses

import numpy as np
import pytest

from tests.scenario.simulation import i32
from tests.unit.control.worlds import world
from tokenspeed.core.step import StepPlan


def lengths(plan: StepPlan) -> list[int]:
    return np.diff(plan.query_starts).tolist()


def test_a_long_prompt_is_cut_into_chunks_of_the_step() -> None:
    w = world()
    w.submit(1, range(40), max_new_tokens=2)
    plans = [w.step() for _ in range(4)]
    assert [lengths(p) for p in plans] == [[16], [16], [8], [1]]
    assert [p.context_lens.tolist() for p in plans] == [[0], [16], [32], [40]]
    assert [p.sample_rows.tolist() for p in plans] == [[], [], [0], [0]]
    assert [p.sample_positions.tolist() for p in plans] == [[], [], [0], [1]]
    assert [p.decode_count for p in plans] == [0, 0, 0, 1]


def test_decode_rows_come_first_and_prefill_takes_the_rest_of_the_step() -> None:
    w = world()
    w.submit(1, range(5), max_new_tokens=50)
    w.submit(2, range(50, 55), max_new_tokens=50)
    first = w.step()
    assert lengths(first) == [5, 5], "several prompts go in one step"
    w.submit(3, range(100, 140), max_new_tokens=2)
    plan = w.step()
    assert plan.decode_count == 2
    assert lengths(plan) == [1, 1, 14]
    assert plan.sample_rows.tolist() == [0, 1]
    assert plan.token_ids[:2].tolist() == [0, 0], "decode tokens live in the execution plane"
    assert plan.token_ids[2:].tolist() == list(range(100, 114))


def test_a_prompt_that_lacks_one_token_is_a_prefill_row() -> None:
    w = world()
    w.submit(1, range(17), max_new_tokens=2)
    w.step()
    plan = w.step()
    assert (plan.decode_count, lengths(plan), plan.token_ids.tolist()) == (0, [1], [16])


def test_waiting_requests_run_in_order_of_priority_then_arrival() -> None:
    w = world(slots_max=1)
    for request, priority in [(1, 5), (2, 0), (3, 5), (4, -1), (5, 0)]:
        w.submit(request, [request], max_new_tokens=1, priority=priority)
    order = []
    while (plan := w.step()) is not None:
        order += plan.bound_requests.tolist()
    assert order == [4, 2, 5, 1, 3]


def test_an_urgent_prompt_goes_before_the_rest_of_a_long_one() -> None:
    w = world()
    w.submit(1, range(60), max_new_tokens=1)
    w.step()
    w.submit(2, range(100, 105), max_new_tokens=1, priority=-1)
    w.submit(3, range(200, 205), max_new_tokens=1)
    plan = w.step()
    assert plan.bound_requests.tolist() == [2]
    assert lengths(plan) == [5, 11], "3 came after 1, and 1 fills the step"
    w.drain()


def test_ids_do_not_decide_the_order() -> None:
    w = world(slots_max=1)
    for request in (9, -3, 2**40):
        w.submit(request, [1], max_new_tokens=1)
    order = []
    while (plan := w.step()) is not None:
        order += plan.bound_requests.tolist()
    assert order == [9, -3, 2**40]


def test_no_more_requests_run_than_there_are_slots() -> None:
    w = world(slots_max=2)
    for request in range(3):
        w.submit(request, [1, 2], max_new_tokens=4)
    plan = w.step()
    assert plan.bound_requests.tolist() == [0, 1]
    assert (w.scheduler.stats().running, w.scheduler.stats().waiting) == (2, 1)
    w.drain()


def test_a_page_is_announced_when_the_first_token_goes_to_it() -> None:
    w = world()
    w.submit(1, range(6), max_new_tokens=4)
    writes = [w.step().groups[0].table_indices.tolist() for _ in range(4)]
    assert writes == [[0, 1], [], [], [2]], "prompt on pages 0 and 1, position 8 on page 2"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_no_more_steps_fly_than_the_overlap_allows(depth: int) -> None:
    w = world(overlap_depth=depth)
    w.submit(1, [1, 2], max_new_tokens=9)
    for _ in range(depth + 1):
        assert w.launch() is not None
    assert w.launch() is None
    w.commit()
    assert w.launch() is not None
    w.drain()


def test_under_overlap_the_next_token_is_planned_before_the_last_is_known() -> None:
    w = world(overlap_depth=1)
    w.submit(1, range(20), max_new_tokens=9)
    first, second = w.launch(), w.launch()
    assert (lengths(first), lengths(second)) == ([16], [4])
    w.commit()
    third = w.launch()
    assert third.decode_count == 1
    assert (third.context_lens.tolist(), third.sample_positions.tolist()) == ([20], [1])
    w.drain()


def test_a_request_is_not_planned_past_its_last_token() -> None:
    w = world(overlap_depth=1)
    w.submit(1, [1, 2, 3], max_new_tokens=2)
    assert w.launch() is not None
    assert w.launch() is not None
    w.commit()
    assert w.launch() is None, "both tokens are in flight or known: nothing is left to sample"
    w.commit()
    assert w.clients[1].finished is not None


def test_plans_outlive_the_calls_that_follow() -> None:
    w = world()
    w.submit(1, range(30), max_new_tokens=30)
    plan = w.step()
    before = {f.name: np.copy(getattr(plan, f.name)) for f in dataclasses.fields(plan)[2:-1]}
    w.drain()
    del w
    for name, value in before.items():
        assert (getattr(plan, name) == value).all()


def test_plan_arrays_are_contiguous_and_of_their_type() -> None:
    w = world()
    w.submit(1, range(5), max_new_tokens=3)
    plan = w.step()
    (group,) = plan.groups
    arrays = [
        value
        for part in (plan, plan.transfers, group, group.stores, group.loads)
        for value in (getattr(part, f.name) for f in dataclasses.fields(part))
        if isinstance(value, np.ndarray)
    ]
    assert len(arrays) == 9 + 3 + 4 + 2 + 3
    names = [plan.bound_requests, plan.transfers.ids, plan.transfers.requests]
    assert all(any(a is name for a in arrays) for name in names)
    assert plan.bound_requests.dtype == np.int64
    assert {a.dtype for a in arrays if all(a is not name for name in names)} == {np.dtype(np.int32)}
    assert all(a.flags.c_contiguous and a.ndim == 1 for a in arrays)


def test_the_same_calls_give_the_same_plans() -> None:
    def run() -> list[str]:
        w = world(pages=20, slots_max=4, overlap_depth=1)
        w.keep_plans = True
        for request in range(12):
            prompt = [request % 3] * 9 + [request]
            w.submit(request * 7919 % 13, prompt, max_new_tokens=25, priority=request % 2)
        w.abort(5)
        w.drain()
        return [repr(plan) for plan in w.plans]

    first = run()
    assert len(first) > 40
    assert first == run()


def test_tokens_shows_prompt_and_output_of_a_live_request() -> None:
    w = world()
    client = w.submit(1, range(5), max_new_tokens=3)
    assert w.scheduler.tokens(1).tolist() == [0, 1, 2, 3, 4], "even before the plan that takes it"
    w.step()
    w.step()
    assert w.scheduler.tokens(1).tolist() == [0, 1, 2, 3, 4, *client.expected[:2]]
    assert w.scheduler.tokens(1).dtype == i32().dtype


def test_stats_count_pages_and_tokens() -> None:
    w = world(slots_max=1)
    w.submit(1, range(10), max_new_tokens=3)
    w.submit(2, range(10), max_new_tokens=3)
    w.step()
    w.step()
    stats = w.scheduler.stats()
    assert (stats.running, stats.waiting) == (1, 1)
    assert stats.waiting_uncached_tokens == 2, "8 of the 10 are in sealed pages by now"
    assert (stats.pages_free, stats.pages_cached, stats.pages_active) == (61, 0, 3)
    w.drain()
    stats = w.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (20, 8, 6)
    assert stats.pages_total == stats.pages_free + stats.pages_cached == 64
