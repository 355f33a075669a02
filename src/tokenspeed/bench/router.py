"""Chooses a replica for each request, as a gateway in front of several engines does."""

import math
from typing import Protocol

from tokenspeed.bench.trace import BLOCK_TOKENS, TraceRequest

__all__ = ["CacheAware", "LeastLoaded", "RoundRobin", "Router", "make_router"]

# A prompt follows its prefix only if at least this part of it was seen there: a shared system
# prompt is no reason to crowd.
_MATCH_PART_MIN = 0.5
# So few requests crowd nobody, whatever the others have: a moved session computes its prompt anew.
_CROWD_MIN = 4


class Router(Protocol):
    """Sees every request once, in the order in which they are sent."""

    def choose(self, request: TraceRequest, copy: int, loads: list[int]) -> int:
        """A replica for a request.

        Args:
            copy: which copy of the trace it is from; copies share nothing.
            loads: requests on their way in each replica.
        """


class RoundRobin:
    """Each replica in turn."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: TraceRequest, copy: int, loads: list[int]) -> int:
        """The replica after the last one."""
        chosen = self._next % len(loads)
        self._next += 1
        return chosen


class LeastLoaded:
    """Whoever has the fewest requests; among equals, whoever got the fewest so far."""

    def __init__(self) -> None:
        self._given: list[int] = []

    def choose(self, request: TraceRequest, copy: int, loads: list[int]) -> int:
        """The least loaded replica."""
        if not self._given:
            self._given = [0] * len(loads)
        given = self._given
        chosen = min(range(len(loads)), key=lambda replica: (loads[replica], given[replica]))
        given[chosen] += 1
        return chosen


class CacheAware:
    """Where the session was, or else the longest prefix; elsewhere if that is overloaded.

    The bound on load is that of consistent hashing with bounded loads (Mirrokni et al., 2018): no
    replica takes more than `load_bound` times its share of the requests on their way, once it has
    more than a few.
    """

    def __init__(self, load_bound: float) -> None:
        self._load_bound = load_bound
        self._sessions: dict[tuple[int, str], int] = {}
        self._blocks: dict[tuple[int, int], int] = {}
        self._least_loaded = LeastLoaded()

    def choose(self, request: TraceRequest, copy: int, loads: list[int]) -> int:
        """The replica that likely holds the prompt's prefix, within the bound."""
        share = math.ceil(self._load_bound * (sum(loads) + 1) / len(loads))
        share_max = max(share, _CROWD_MIN)
        chosen = self._known(request, copy)
        if chosen is None or loads[chosen] + 1 > share_max:
            chosen = self._least_loaded.choose(request, copy, loads)
        if request.session is not None:
            self._sessions[copy, request.session] = chosen
        for block in request.full_blocks:
            self._blocks[copy, block] = chosen
        return chosen

    def _known(self, request: TraceRequest, copy: int) -> int | None:
        if request.session is not None:
            chosen = self._sessions.get((copy, request.session))
            if chosen is not None:
                return chosen
        blocks = request.full_blocks
        for count in range(len(blocks), 0, -1):
            if count * BLOCK_TOKENS < _MATCH_PART_MIN * request.input_tokens:
                break
            chosen = self._blocks.get((copy, blocks[count - 1]))
            if chosen is not None:
                return chosen
        return None


def make_router(name: str, *, load_bound: float) -> Router:
    """A router by its name in `config.ROUTERS`."""
    if name == "round-robin":
        return RoundRobin()
    if name == "least-loaded":
        return LeastLoaded()
    assert name == "cache-aware"
    return CacheAware(load_bound)
