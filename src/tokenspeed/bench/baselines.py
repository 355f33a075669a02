"""What other caches would have hit on the very requests that each replica got.

Both look on from outside: a request takes no time, and running ones need no room. So they are
bounds for a cache of the same size in a real engine, not engines themselves.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenspeed.bench.optimum import optimum_hits
from tokenspeed.bench.results import Results
from tokenspeed.bench.tokens import TraceTokens, assign_tokens
from tokenspeed.bench.trace import Trace
from tokenspeed.core.step import FinishReason, Int64Array

__all__ = ["Baselines", "find_baselines", "lru_hits", "trace_pages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """Prompt tokens that would have come from cache, over all replicas.

    Attributes:
        lru_tokens: with plain LRU.
        optimum_tokens: with a cache that knows the future (Belady).
    """

    lru_tokens: int
    optimum_tokens: int


def find_baselines(trace: Trace, results: Results, *, pages: int, page_size: int) -> Baselines:
    """Hits of other caches of `pages` pages, replica by replica, requests in order of arrival."""
    tokens = assign_tokens(trace)
    read, written, names = trace_pages(trace, tokens, page_size)
    served = results.reasons == FinishReason.LENGTH
    lru = optimum = 0
    for replica in range(len(results.steps)):
        (chosen,) = np.nonzero(served & (results.replica == replica))
        chosen = chosen[np.argsort(results.arrived_us[chosen], kind="stable")]
        requests: list[tuple[float, Sequence[int]]] = []
        answers: list[Sequence[int]] = []
        for request in chosen.tolist():
            entry = int(results.trace_index[request])
            # Copies share nothing: each has names of its own.
            offset = int(results.copy[request]) * names
            at_us = float(results.arrived_us[request])
            requests.append((at_us, (read[entry] + offset).tolist()))
            answers.append((written[entry] + offset).tolist())
        lru += lru_hits([entry[1] for entry in requests], pages, answers)
        optimum += optimum_hits(requests, pages, written=answers)
    return Baselines(lru_tokens=lru * page_size, optimum_tokens=optimum * page_size)


def lru_hits(
    requests: Sequence[Sequence[int]], capacity: int, written: Sequence[Sequence[int]]
) -> int:
    """Pages that plain LRU serves: whoever was used longest ago goes, of one request's the deepest.

    Args:
        requests: pages of each prompt from its first one on, in order of time.
        capacity: pages the cache can hold.
        written: pages that each answer adds behind its prompt.
    """
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for prompt, answer in zip(requests, written, strict=True):
        for page in prompt:
            if page not in held:
                break
            hits += 1
        for page in reversed([*prompt, *answer]):
            held[page] = None
            held.move_to_end(page)
        while len(held) > capacity:
            held.popitem(last=False)
    return hits


def trace_pages(
    trace: Trace, tokens: TraceTokens, page_size: int
) -> tuple[list[Int64Array], list[Int64Array], int]:
    """Names for pages: equal ones stand for equal tokens after equal pages.

    Returns:
        For each request the pages of its prompt that a cache can serve (never the last token,
        which must be computed), the pages it fills beyond those, and how many names there are.
    """
    names: dict[tuple[int, bytes], int] = {}
    streams: dict[int, list[int]] = {}
    read: list[Int64Array] = []
    written: list[Int64Array] = []

    def extend(run: list[int], pages: np.ndarray) -> None:
        for page in pages:
            key = (run[-1] if run else -1, page.tobytes())
            run.append(names.setdefault(key, len(names)))

    for index, request in enumerate(trace.requests):
        start = int(tokens.prompt_starts[index])
        answer = int(tokens.output_starts[index])
        together = answer == start + request.input_tokens
        # The KV of the last token sampled is never written.
        total = (request.input_tokens + request.output_tokens - 1) // page_size
        shared = total if together else request.input_tokens // page_size
        stream = streams.setdefault(start, [])
        if len(stream) < shared:
            first, last = start + len(stream) * page_size, start + shared * page_size
            extend(stream, tokens.flat[first:last].reshape(-1, page_size))
        run = stream[:shared]
        if shared < total:
            rest = np.concatenate(
                [
                    tokens.flat[start + shared * page_size : start + request.input_tokens],
                    tokens.flat[answer : answer + request.output_tokens],
                ]
            )
            extend(run, rest[: (total - shared) * page_size].reshape(-1, page_size))
        servable = (request.input_tokens - 1) // page_size
        pages = np.array(run, dtype=np.int64)
        read.append(pages[:servable])
        written.append(pages[servable:])
    return read, written, len(names)
