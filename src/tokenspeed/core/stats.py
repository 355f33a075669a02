"""Where a scheduler stands, as every room that tells of it passes it on."""

from tokenspeed.core.records import Record

__all__ = ["SchedulerStats"]


class SchedulerStats(Record, frozen=True, kw_only=True):
    """Where the scheduler stands.

    Attributes:
        running, waiting: requests that steps take along, and those queued for a slot.
        parked: requests that gave their slot to a more urgent one and keep their pages.
        transferring: transfers under way.
        waiting_uncached_tokens: tokens of waiting requests that the cache does not hold now.
        pages_total: pages of the device, of all groups, each of them one of the three below.
        pages_free: without content.
        pages_cached: sealed, in use by no request, evictable.
        pages_active: held by a request, or read by a step in flight.
        host_pages_total, host_pages_cached: pages of the host, and those with content.
        steps: steps launched.
        prompt_tokens, cached_tokens: of admitted requests, and how many of them came from cache.
        missed_evicted_tokens: the cache held them before, as far as it remembers.
        missed_unseen_tokens: it never did.
        missed_other_salt_tokens: nor did it, but it holds the prompt's first page under another
            salt: the most that sharing between salts could have saved. No request is told.
        missed_tail_tokens: they fill no page, or share one with the prompt's last token.
        output_tokens: tokens sampled that belong to a request's output.
        drafted_tokens, accepted_tokens: guesses that steps were given to verify, and those of
            them that were sampled as guessed and belong to a request's output.
        proposed_tokens: what a draft model proposed. Those that became drafts count as drafted.
        draft_memory_size_bytes: what the texts take that drafts come from.
        retractions: requests sent back to the queue for want of pages.
        parkings: requests that gave up their slot.
        evictions: cached pages of the device that made room for others.
        stores, loads: pages copied to the host and back.
        refusals: requests that were refused because they would have waited too long.
    """

    running: int
    waiting: int
    parked: int
    transferring: int
    waiting_uncached_tokens: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_active: int
    host_pages_total: int
    host_pages_cached: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    missed_evicted_tokens: int
    missed_unseen_tokens: int
    missed_other_salt_tokens: int
    missed_tail_tokens: int
    output_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    proposed_tokens: int
    draft_memory_size_bytes: int
    retractions: int
    parkings: int
    evictions: int
    stores: int
    loads: int
    refusals: int
