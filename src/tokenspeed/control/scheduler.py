"""The scheduler's typed face: names the parts of the buffers that the C++ control plane returns."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenspeed import _control
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.stats import SchedulerStats
from tokenspeed.core.step import (
    NO_CARGO,
    NO_COUNTS,
    NO_IDS,
    NO_MOVES,
    NO_TRANSFERS,
    Cargo,
    GroupPlan,
    Handover,
    Int32Array,
    Int64Array,
    Moves,
    StepOutcome,
    StepPlan,
    StepResult,
    StepWork,
    Transfers,
)

__all__ = ["CacheEvents", "Scheduler"]


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


_NO_DRAFT_REPORTS: Int32Array = NO_COUNTS.reshape(0, 2)
_NO_CACHE_REPORTS: Int32Array = NO_COUNTS.reshape(0, 5)


class Scheduler:
    """Decides what each step runs and who holds which KV page.

    One engine step reads `plan`, launch, `commit`, `take_outcome`. Not thread-safe. All arrays
    own their memory.

    Attributes:
        proposal_window: see `SchedulerConfig`.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        """Raises `ConfigError` if the configuration contradicts itself."""
        self.proposal_window = config.proposal_window
        self._native = _control.Scheduler(
            groups=[
                (
                    group.kind,
                    group.pages,
                    group.host_pages,
                    group.window or 0,
                    group.checkpoint_pages or 0,
                )
                for group in config.groups
            ],
            page_size=config.page_size,
            slots_max=config.slots_max,
            step_tokens_max=config.step_tokens_max,
            context_max=config.context_max,
            overlap_depth=config.overlap_depth,
            prefix_cache=config.prefix_cache,
            cache_policy=config.cache_policy,
            tps_floor=config.tps_floor,
            queue_timeout_us=config.queue_timeout_us,
            step_drafts_max=config.step_drafts_max,
            step_proposals_max=config.step_proposals_max,
            proposal_length_max=config.proposal_length_max,
            proposal_window=config.proposal_window,
            draft_memory_size_bytes=config.draft_memory_size_bytes,
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
        handover: Handover = Handover.NONE,
        tenant: int = 0,
    ) -> None:
        """Queues a request; the next `plan` takes it up.

        Args:
            request: an id not in use; an id is free again once the request's pages are back.
            prompt: [P] token ids, P >= 1.
            max_new_tokens: at most this many tokens are generated, and never past the context.
            min_new_tokens: a stop token among the first so many does not stop.
            stop_token_ids: tokens that end the request; the one that does is its last token.
            salt: unsigned 64-bit; requests share cached pages only within a salt.
            priority: lower goes first.
            handover: whether another engine takes or brings the request's KV.
            tenant: unsigned 64-bit, equal for requests of one tenant. Within a priority the tenant
                that was given the fewest tokens goes first; within a tenant, whoever came first.

        Raises:
            InvalidParameter: an id in use, an empty prompt, a negative token id or limit.
            ContextOverflow: the prompt leaves no room for a token.
        """
        self._native.submit(
            request,
            prompt,
            max_new_tokens,
            min_new_tokens,
            stop_token_ids,
            salt,
            priority,
            handover,
            tenant,
        )

    def abort(self, request: int) -> None:
        """Ends a request at the next `plan`; an unknown id may just have finished: ignored."""
        self._native.abort(request)

    def transferred(self, transfer: int, *, complete: bool) -> None:
        """Says at the next `plan` that a transfer is over, and whether it did what it should.

        Raises:
            EngineError: no such transfer is under way.
        """
        self._native.transferred(transfer, complete)

    def plan(self, now_us: int) -> StepPlan | None:
        """Applies what was queued, then launches a step and says what it runs.

        None if nothing can run now, or `overlap_depth + 1` steps are uncommitted. Requests that
        ended on the way (aborted, rejected, refused) are in the next outcome in either case.

        Args:
            now_us: the time, in microseconds that never go back. The control plane reads no
                clock: the same calls give the same plans.
        """
        planned = self._native.plan(now_us)
        if planned is None:
            return None
        step, decode_count, rows, tokens, samples, counts, bound, transfers = planned[:8]
        parts, ids, groups = planned[8:]
        take = _Reader(np.frombuffer(parts, dtype=np.int32))
        name = _Reader(np.frombuffer(ids, dtype=np.int64) if ids else NO_IDS)
        return StepPlan(
            step=step,
            decode_count=decode_count,
            row_slots=take(rows),
            query_starts=take(rows + 1),
            context_lens=take(rows),
            token_ids=take(tokens),
            sample_rows=take(samples),
            sample_positions=take(samples),
            propose_counts=take(counts) if counts else NO_COUNTS,
            bound_slots=take(bound) if bound else NO_COUNTS,
            bound_requests=name(bound),
            transfers=_transfers(transfers, name, take),
            groups=tuple([_group_plan(*group) for group in groups]),
        )

    def commit(
        self, step: int, tokens: Int32Array, now_us: int, *, result: StepResult | None = None
    ) -> None:
        """Retires the oldest uncommitted step with the tokens [S] it sampled.

        Args:
            step: its number.
            tokens: what it sampled.
            now_us: the time, as for `plan`.
            result: which of its drafts were cut, and where the draft model's proposals are, if it
                had any. These change no token of any output, whatever they are: a chance below 0
                or above 1 is taken as that, one that is no number as 0.

        Raises:
            EngineError: it is not the oldest, or there are more or fewer tokens than it samples,
                or a row has more proposals than it was to get, or a token id is negative, or a cut
                is not of one of its drafts. Nothing is changed then.
        """
        cuts = [] if result is None else list(result.cuts.items())
        if result is None or not len(result.proposed_starts):
            self._native.commit(step, tokens, now_us, cuts=cuts)
        else:
            self._native.commit(
                step,
                tokens,
                now_us,
                result.proposed_starts,
                result.proposed_tokens,
                result.proposed_chances,
                result.caught_up_tokens,
                cuts=cuts,
            )

    def take_outcome(self) -> StepOutcome:
        """What happened to requests since the last call."""
        count, finished, admitted, in_parts, in_ids = self._native.take_outcome()
        parts: Int32Array = np.frombuffer(in_parts, dtype=np.int32)
        ids: Int64Array = np.frombuffer(in_ids, dtype=np.int64)
        if not (finished or admitted):
            return StepOutcome(
                requests=ids,
                tokens=parts[:count],
                sample_indices=parts[count : 2 * count],
                cached_counts=parts[2 * count :],
                finished=NO_IDS,
                admitted=NO_IDS,
                reasons=NO_COUNTS,
                retries_ms=NO_COUNTS,
                draft_reports=_NO_DRAFT_REPORTS,
                cache_reports=_NO_CACHE_REPORTS,
            )
        ended = 3 * count + 2 * finished
        end = ended + 2 * finished
        return StepOutcome(
            requests=ids[:count],
            tokens=parts[:count],
            sample_indices=parts[count : 2 * count],
            cached_counts=parts[2 * count : 3 * count],
            finished=ids[count : count + finished],
            admitted=ids[count + finished :],
            reasons=parts[3 * count : 3 * count + finished],
            retries_ms=parts[3 * count + finished : ended],
            draft_reports=parts[ended:end].reshape(finished, 2),
            cache_reports=parts[end:].reshape(admitted, 5),
        )

    def tokens(self, request: int) -> Int32Array:
        """Prompt and output so far of a live request; raises `InvalidParameter` for any other."""
        return self._native.tokens(request)

    def stats(self) -> SchedulerStats:
        """Where the scheduler stands. O(waiting requests)."""
        fields = SchedulerStats.__struct_fields__
        return SchedulerStats(**dict(zip(fields, self._native.stats(), strict=True)))

    def observe(self, work: StepWork, took_us: int) -> None:
        """Teaches the model of step times a step that ran elsewhere, to know the machine before
        the first request; steps that are planned and committed here teach it by themselves."""
        self._native.observe(
            prefill_tokens=work.prefill_tokens,
            decode_rows=work.decode_rows,
            draft_tokens=work.draft_tokens,
            proposed_tokens=work.proposed_tokens,
            proposal_rounds=work.proposal_rounds,
            caught_up_tokens=work.caught_up_tokens,
            context_tokens=work.context_tokens,
            prefill_pairs=work.prefill_pairs,
            took_us=took_us,
        )

    def predict_us(self, work: StepWork) -> float:
        """Microseconds a step of this work takes on average; 0 before any step was seen."""
        return self._native.predict_us(
            prefill_tokens=work.prefill_tokens,
            decode_rows=work.decode_rows,
            draft_tokens=work.draft_tokens,
            proposed_tokens=work.proposed_tokens,
            proposal_rounds=work.proposal_rounds,
            caught_up_tokens=work.caught_up_tokens,
            context_tokens=work.context_tokens,
            prefill_pairs=work.prefill_pairs,
        )

    def interval_bound_us(self, context: int) -> float | None:
        """The longest interval between two tokens that keeps the floor for a user of `context`
        tokens: 1 / floor, or that of 90% of what one user alone gets where that is longer.
        None where no floor is held."""
        return self._native.interval_bound_us(context)

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


class _Reader:
    """Takes parts off a buffer, one after the other."""

    def __init__(self, buffer: npt.NDArray[Any]) -> None:
        self._buffer = buffer
        self._at = 0

    def __call__(self, count: int) -> npt.NDArray[Any]:
        begin = self._at
        self._at = begin + count
        return self._buffer[begin : self._at]


def _transfers(count: int, ids: _Reader, kinds: _Reader) -> Transfers:
    if not count:
        return NO_TRANSFERS
    return Transfers(ids=ids(count), requests=ids(count), kinds=kinds(count))


def _group_plan(
    kind: int, counts: tuple[int, int, int, int, int, int, int], buffer: bytearray
) -> GroupPlan:
    tokens, writes, stores, copies, saves, loads, handovers = counts
    parts: Int32Array = np.frombuffer(buffer, dtype=np.int32)
    if len(parts) == tokens:
        # Most decode steps begin no page.
        return GroupPlan(
            kind=kind,
            kv_slots=parts,
            table_slots=NO_COUNTS,
            table_indices=NO_COUNTS,
            table_pages=NO_COUNTS,
        )
    take = _Reader(parts)

    def moves(count: int) -> Moves:
        return Moves(sources=take(count), targets=take(count)) if count else NO_MOVES

    def cargo(count: int) -> Cargo:
        if not count:
            return NO_CARGO
        return Cargo(transfers=take(count), elsewhere=take(count), pages=take(count))

    return GroupPlan(
        kind=kind,
        kv_slots=take(tokens),
        table_slots=take(writes),
        table_indices=take(writes),
        table_pages=take(writes),
        stores=moves(stores),
        copies=moves(copies),
        saves=moves(saves),
        loads=cargo(loads),
        handovers=cargo(handovers),
    )
