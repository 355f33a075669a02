"""The most a prefix cache could hit, had it known all requests in advance (Belady's MIN).

The cache holds `capacity` blocks. A request reads its blocks in order, and a block is a hit if it
and every block before it are held. After the request the cache may keep any of what it held and
what the request read or wrote; nothing is charged for the room the request itself runs in.

Keeping the blocks whose next use comes soonest, bypass allowed, hits most often when each block
counts for itself (L. A. Belady, A study of replacement algorithms for a virtual-storage computer,
IBM Systems Journal 5(2), 1966). The rule that a block is of use only behind its whole prefix costs
nothing: whoever reads a block reads all before it, so those are next used no later, and of equals
the deepest is dropped first. The result is therefore the optimum of this model and no cache that
learns requests as they come, or must find room for the running ones, can do better.
"""

import heapq
from collections.abc import Iterable, Sequence
from itertools import takewhile

__all__ = ["distinct_blocks", "live_blocks_max", "optimum_hits"]

Reads = Sequence[tuple[float, Sequence[int]]]


def optimum_hits(
    requests: Reads, capacity: int, *, written: Sequence[Sequence[int]] | None = None
) -> int:
    """How many blocks of all prompts the best possible cache serves.

    Args:
        requests: time (any unit) and blocks of each prompt, from its first one on. A block stands
            for its content and all before it: equal numbers mean equal prefixes. Sorted by time,
            requests of one time in the order given.
        capacity: blocks the cache can hold.
        written: for each request, in the order given, the blocks that its answer adds behind its
            prompt: held afterwards if worth it, never counted as hits of this request.

    Returns:
        Blocks served from cache, summed over all requests. O(B log B) for B blocks read.

    Raises:
        ValueError: a negative capacity, or `written` for more or fewer requests.
    """
    if capacity < 0:
        raise ValueError(f"the capacity must be at least 0 blocks, but is {capacity}")
    turns = _in_order(requests, written)
    # Next use of each request's blocks, found from the end. A block is written before it is read.
    never = len(turns)
    upcoming: dict[int, int] = {}
    next_uses: list[list[int]] = [[]] * len(turns)
    for at in range(len(turns) - 1, -1, -1):
        read, added = turns[at]
        next_uses[at] = [upcoming.get(block, never) for block in (*read, *added)]
        for block in read:
            upcoming[block] = at

    hits = 0
    held: dict[int, int] = {}  # block: when it is used next
    farthest: list[tuple[int, int, int]] = []  # (-next use, -depth, block), some out of date
    for (read, added), uses in zip(turns, next_uses, strict=True):
        hits += sum(1 for _ in takewhile(held.__contains__, read))
        for depth, (block, use) in enumerate(zip((*read, *added), uses, strict=True)):
            if use == never:
                held.pop(block, None)
            else:
                held[block] = use
                heapq.heappush(farthest, (-use, -depth, block))
        while len(held) > capacity:
            use, _, block = heapq.heappop(farthest)
            if held.get(block) == -use:
                del held[block]
    return hits


def distinct_blocks(requests: Reads, written: Iterable[Sequence[int]] = ()) -> int:
    """How many different blocks are read or written: the cache that would never drop one."""
    return len({block for _, read in requests for block in read}.union(*written))


def live_blocks_max(requests: Reads, written: Sequence[Sequence[int]] | None = None) -> int:
    """The most blocks between their first and last use at once: all that a knowing cache needs.

    Arguments as for `optimum_hits`.
    """
    turns = _in_order(requests, written)
    last = {block: at for at, turn in enumerate(turns) for blocks in turn for block in blocks}
    live: set[int] = set()
    most = 0
    for at, (read, added) in enumerate(turns):
        live.update(read, added)
        most = max(most, len(live))
        live.difference_update(block for block in (*read, *added) if last[block] == at)
    return most


def _in_order(
    requests: Reads, written: Sequence[Sequence[int]] | None
) -> list[tuple[Sequence[int], Sequence[int]]]:
    if written is not None and len(written) != len(requests):
        raise ValueError(
            f"`written` must list the blocks of each of the {len(requests)} requests, "
            f"but lists {len(written)}"
        )
    order = sorted(range(len(requests)), key=lambda i: requests[i][0])
    return [(requests[i][1], written[i] if written is not None else ()) for i in order]
