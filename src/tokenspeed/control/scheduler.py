"""The scheduler's typed face: names the parts of the buffers that the C++ control plane returns."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenspeed import _control
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.step import GroupPlan, Int32Array, Int64Array, StepOutcome, StepPlan

__all__ = ["CacheEvents", "Scheduler", "SchedulerStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Where the scheduler stands.

    Attributes:
        running, waiting: requests with and without a slot.
        waiting_uncached_tokens: tokens of waiting requests that the cache does not hold now.
        pages_total: pages of the pool, each of them one of the three below.
        pages_free: without content.
        pages_cached: sealed, in use by no request, evictable.
        pages_active: held by a request, or read by a step in flight.
        steps: steps launched.
        prompt_tokens, cached_tokens: of admitted requests, and how many of them came from cache.
        output_tokens: tokens sampled that belong to a request's output.
        retractions: requests sent back to the queue for want of pages.
        evictions: cached pages that made room for others.
    """

    running: int
    waiting: int
    waiting_uncached_tokens: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_active: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    retractions: int
    evictions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEvents:
    """What entered and left the prefix cache, in order. K events.

    Attributes:
        kinds: [K] 0 stored, 1 removed, 2 cleared (everything is gone).
        hashes: [K] name of the page's content and of all before it; 0 where cleared.
        parents: [K] the page before it, for a stored one.
        has_parent: [K] False for a prompt's first page; its entry in `parents` is 0.
        tokens: [stored events * page_size] tokens of the stored pages, in order.
    """

    kinds: Int32Array
    hashes: Int64Array
    parents: Int64Array
    has_parent: npt.NDArray[np.bool_]
    tokens: Int32Array


class Scheduler:
    """Decides what each step runs and who holds which KV page.

    One engine step reads `plan`, launch, `commit`, `take_outcome`. Not thread-safe. All arrays
    own their memory.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        """Raises `ConfigError` if the configuration contradicts itself."""
        self._native = _control.Scheduler(
            pages=config.pages,
            page_size=config.page_size,
            slots_max=config.slots_max,
            step_tokens_max=config.step_tokens_max,
            context_max=config.context_max,
            overlap_depth=config.overlap_depth,
            prefix_cache=config.prefix_cache,
        )

    def submit(
        self,
        request: int,
        prompt: Int32Array,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        stop_token_ids: Int32Array,
        salt: int = 0,
        priority: int = 0,
    ) -> None:
        """Queues a request; the next `plan` takes it up.

        Args:
            request: an id not in use; an id is free again once the request's pages are back.
            prompt: [P] token ids, P >= 1.
            max_new_tokens: at most this many tokens are generated, and never past the context.
            min_new_tokens: a stop token among the first so many does not stop.
            stop_token_ids: tokens that end the request; the one that does is its last token.
            salt: unsigned 64-bit; requests share cached pages only within a salt.
            priority: lower goes first; within a priority, whoever came first.

        Raises:
            InvalidParameter: an id in use, an empty prompt, a negative token id or limit.
            ContextOverflow: the prompt leaves no room for a token.
        """
        self._native.submit(
            request, prompt, max_new_tokens, min_new_tokens, stop_token_ids, salt, priority
        )

    def abort(self, request: int) -> None:
        """Ends a request at the next `plan`; an unknown id may just have finished: ignored."""
        self._native.abort(request)

    def plan(self) -> StepPlan | None:
        """Applies what was queued, then launches a step and says what it runs.

        None if nothing can run now, or `overlap_depth + 1` steps are uncommitted. Requests that
        ended on the way (aborted, rejected) are in the next outcome in either case.
        """
        planned = self._native.plan()
        if planned is None:
            return None
        step, decode_count, rows, tokens, samples, bound, writes, parts, bound_requests = planned
        starts = rows
        lens = starts + rows + 1
        ids = lens + rows
        kv = ids + tokens
        sampled = kv + tokens
        positions = sampled + samples
        slots = positions + samples
        table = slots + bound
        return StepPlan(
            step=step,
            decode_count=decode_count,
            row_slots=parts[:starts],
            query_starts=parts[starts:lens],
            context_lens=parts[lens:ids],
            token_ids=parts[ids:kv],
            sample_rows=parts[sampled:positions],
            sample_positions=parts[positions:slots],
            bound_slots=parts[slots:table],
            bound_requests=bound_requests,
            groups=(
                GroupPlan(
                    kv_slots=parts[kv:sampled],
                    table_slots=parts[table : table + writes],
                    table_indices=parts[table + writes : table + 2 * writes],
                    table_pages=parts[table + 2 * writes :],
                ),
            ),
        )

    def commit(self, step: int, tokens: Int32Array) -> None:
        """Retires the oldest uncommitted step with the tokens [S] it sampled.

        Raises:
            EngineError: it is not the oldest, or there are more or fewer tokens than it samples.
        """
        self._native.commit(step, tokens)

    def take_outcome(self) -> StepOutcome:
        """What happened to requests since the last call."""
        count, finished, parts, ids = self._native.take_outcome()
        return StepOutcome(
            requests=ids[:count],
            tokens=parts[:count],
            sample_indices=parts[count : 2 * count],
            cached_counts=parts[2 * count : 3 * count],
            finished=ids[count : count + finished],
            reasons=parts[3 * count :],
        )

    def tokens(self, request: int) -> Int32Array:
        """Prompt and output so far of a live request; raises `InvalidParameter` for any other."""
        return self._native.tokens(request)

    def stats(self) -> SchedulerStats:
        """Where the scheduler stands. O(waiting requests)."""
        stats = self._native.stats()
        return SchedulerStats(
            running=stats[0],
            waiting=stats[1],
            waiting_uncached_tokens=stats[2],
            pages_total=stats[3],
            pages_free=stats[4],
            pages_cached=stats[5],
            pages_active=stats[6],
            steps=stats[7],
            prompt_tokens=stats[8],
            cached_tokens=stats[9],
            output_tokens=stats[10],
            retractions=stats[11],
            evictions=stats[12],
        )

    def flush_cache(self) -> bool:
        """Forgets every cached page in use by no request; False if requests are live."""
        return self._native.flush_cache()

    def record_cache_events(self, on: bool) -> None:
        """Starts or stops recording; a start first reports the present content, parents first."""
        self._native.record_cache_events(on)

    def take_cache_events(self) -> CacheEvents | None:
        """What was recorded since the last call, None if nothing was."""
        events = self._native.take_cache_events()
        if events is None:
            return None
        count, parts, names, has_parent = events
        return CacheEvents(
            kinds=parts[:count],
            hashes=names[:count],
            parents=names[count:],
            has_parent=has_parent,
            tokens=parts[count:],
        )

    def audit(self) -> None:
        """Counts every page, reference and slot. O(pages); raises `EngineError` on a wrong one."""
        self._native.audit()
