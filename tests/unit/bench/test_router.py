"""Routers: who gets what."""

from collections import Counter

import numpy as np

from tests.unit.bench.traces import configured, sessions
from tokenspeed.bench import TraceRequest, simulate
from tokenspeed.bench.router import CacheAware, LeastLoaded, RoundRobin


def request(*blocks: int, session: str | None = None) -> TraceRequest:
    return TraceRequest(
        sent_us=0,
        input_tokens=512 * len(blocks) + 10,
        output_tokens=1,
        blocks=blocks,
        session=session,
    )


def test_round_robin_takes_turns() -> None:
    router = RoundRobin()
    assert [router.choose(request(), 0, [9, 0, 0]) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_the_least_loaded_is_chosen_and_equals_take_turns() -> None:
    router = LeastLoaded()
    assert router.choose(request(), 0, [2, 1, 3]) == 1
    assert [router.choose(request(), 0, [0, 0, 0]) for _ in range(3)] == [0, 2, 0]


def test_a_session_stays_where_it_is() -> None:
    router = CacheAware(load_bound=4.0)
    first = router.choose(request(session="a"), 0, [0, 0, 0])
    assert router.choose(request(session="b"), 0, [1, 0, 0]) != first
    assert router.choose(request(7, 8, session="a"), 0, [3, 2, 2]) == first


def test_without_sessions_the_longest_prefix_leads() -> None:
    router = CacheAware(load_bound=4.0)
    one = router.choose(request(1, 2, 3), 0, [0, 0])
    other = router.choose(request(1, 5, 6), 0, [1, 0])
    assert one != other
    assert router.choose(request(1, 2, 3, 4), 0, [1, 1]) == one
    assert router.choose(request(1, 5, 6, 9), 0, [1, 1]) == other
    # Another copy of the trace has other prefixes; it goes where least is to do.
    assert router.choose(request(1, 2, 3, 4), 1, [1, 0] if one == 0 else [0, 1]) == other


def test_a_shared_system_prompt_is_no_reason_to_crowd() -> None:
    router = CacheAware(load_bound=100.0)
    chosen = [router.choose(request(0, 10 + n, 20 + n), 0, [0] * 4) for n in range(8)]
    assert Counter(chosen) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_no_replica_takes_more_than_its_bound() -> None:
    router = CacheAware(load_bound=1.5)
    home = router.choose(request(session="a"), 0, [0, 0])
    few, many = ([3, 0], [4, 0]) if home == 0 else ([0, 3], [0, 4])
    assert router.choose(request(session="a"), 0, few) == home
    moved = router.choose(request(session="a"), 0, many)
    assert moved != home
    # The session lives there from now on.
    assert router.choose(request(session="a"), 0, [2, 2]) == moved


def test_load_spreads_and_sessions_keep_their_replica() -> None:
    trace = sessions(32, 4)
    config = configured(replicas=4, router="cache-aware", load_bound=3.0)
    results = simulate(trace, config)
    homes: dict[str | None, set[int]] = {}
    for index, replica in zip(results.trace_index, results.replica, strict=True):
        homes.setdefault(trace.requests[index].session, set()).add(int(replica))
    assert all(len(found) == 1 for found in homes.values())
    per_replica = np.bincount(results.replica, minlength=4)
    assert per_replica.min() >= 0.5 * per_replica.mean()


def test_affinity_hits_more_than_taking_turns() -> None:
    trace = sessions(32, 4)
    hits = {
        router: int(simulate(trace, configured(replicas=4, router=router)).cached.sum())
        for router in ("cache-aware", "round-robin")
    }
    assert hits["cache-aware"] > 1.5 * hits["round-robin"]


def test_groups_of_replicas_share_out_the_sessions() -> None:
    results = simulate(sessions(30, 2), configured(replicas=6, group_replicas=2))
    assert sorted(set(results.replica.tolist())) == list(range(6))
    groups = Counter((results.replica[results.turn == 0] // 2).tolist())
    assert groups == {0: 10, 1: 10, 2: 10}
