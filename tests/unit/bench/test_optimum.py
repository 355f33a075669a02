"""The offline optimum is what trying everything finds, whatever the prompts share."""

import itertools
import random

import pytest

from tokenspeed.bench.optimum import distinct_blocks, live_blocks_max, optimum_hits


def best_by_trial(reads: list[list[int]], writes: list[list[int]], capacity: int) -> int:
    """Follows every choice of what to keep after each request."""
    states = {frozenset[int](): 0}
    for read, added in zip(reads, writes, strict=True):
        following: dict[frozenset[int], int] = {}
        for held, before in states.items():
            hits = before + len(list(itertools.takewhile(held.__contains__, read)))
            within = held.union(read, added)
            for count in range(min(capacity, len(within)) + 1):
                for kept in itertools.combinations(sorted(within), count):
                    key = frozenset(kept)
                    following[key] = max(following.get(key, 0), hits)
        states = following
    return max(states.values())


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_of_what_to_keep_hits_more(seed: int) -> None:
    rng = random.Random(seed)
    # A small tree of prompts: block -> the one before it.
    before: dict[int, int | None] = {0: None}
    for block in range(1, 6):
        before[block] = rng.choice([None, *before])
    paths = []
    for block in before:
        path = [block]
        while (parent := before[path[0]]) is not None:
            path.insert(0, parent)
        paths.append(path)
    reads, writes = [], []
    for _ in range(7):
        path = rng.choice(paths)
        cut = rng.randint(1, len(path))
        reads.append(path[:cut])
        writes.append(path[cut:])
    requests = [(float(at), read) for at, read in enumerate(reads)]
    for capacity in range(4):
        found = optimum_hits(requests, capacity, written=writes)
        assert found == best_by_trial(reads, writes, capacity), f"{seed=} {capacity=}"


def test_what_an_answer_wrote_is_hit_by_the_next_turn_but_not_by_its_own() -> None:
    turns = [(0.0, [1]), (1.0, [1, 2])]
    assert optimum_hits(turns, 2) == 1
    assert optimum_hits(turns, 2, written=[[2], [3]]) == 2
    assert distinct_blocks(turns, [[2], [3]]) == 3


def test_requests_are_taken_by_time_and_not_by_place() -> None:
    assert optimum_hits([(5.0, [1, 2]), (1.0, [1]), (2.0, [3])], 1) == 1


def test_the_live_set_is_all_that_the_optimum_needs() -> None:
    turns = [(float(at), [10 * (at // 3), 10 * (at // 3) + 1]) for at in range(12)]
    assert (distinct_blocks(turns), live_blocks_max(turns)) == (8, 2)
    assert optimum_hits(turns, 2) == optimum_hits(turns, 8) == 16
    assert optimum_hits(turns, 1) == 8


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0 blocks"):
        optimum_hits([], -1)
    with pytest.raises(ValueError, match="each of the 1 requests"):
        optimum_hits([(0.0, [1])], 1, written=[])
