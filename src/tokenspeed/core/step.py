"""The values that cross between the control plane and the execution plane, once per step.

Legend of sizes: R rows, T tokens, S sampled rows, B slots newly bound, D page-table entries
written, K events, M pages moved, X transfers begun, P tokens that a draft model proposed.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

__all__ = [
    "NO_CARGO",
    "NO_COUNTS",
    "NO_CUTS",
    "NO_IDS",
    "NO_MOVES",
    "NO_TRANSFERS",
    "CacheReport",
    "Cargo",
    "FinishReason",
    "GroupPlan",
    "Handover",
    "Moves",
    "SampledLogprobs",
    "StepOutcome",
    "StepPlan",
    "StepResult",
    "StepWork",
    "TransferKind",
    "Transfers",
]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class FinishReason(enum.IntEnum):
    """Why a request ended. The numbers are the control plane's."""

    STOP = 1
    """A stop token was sampled; it is the request's last token."""
    LENGTH = 2
    """max_new_tokens or the context was reached."""
    ABORT = 3
    """The client, or a stop string, ended it."""
    REJECTED = 4
    """It can never fit: its pages exceed the pool."""
    REFUSED = 5
    """It would have waited, or did wait, for longer than the queue's limit."""


class Handover(enum.IntEnum):
    """Where a request's KV comes from or goes to, beside this engine."""

    NONE = 0
    SEND = 1
    """It ends after its first token, and another engine takes its KV."""
    RECEIVE = 2
    """Another engine brings the KV of all its tokens but the last."""


class TransferKind(enum.IntEnum):
    """What a transfer does. The numbers are the control plane's."""

    LOAD = 0
    """Pages of the host are copied to pages of the device."""
    SEND = 1
    """Another engine reads pages of the device."""
    RECEIVE = 2
    """Another engine writes pages of the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfers:
    """Transfers that a plan begins, after its stores. Each is reported when it is over.

    Attributes:
        ids: [X] names to report them by.
        requests: [X] whose they are.
        kinds: [X] `TransferKind`s.
    """

    ids: Int64Array
    requests: Int64Array
    kinds: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Pages to be copied, one to one: sources [M], targets [M]."""

    sources: Int32Array
    targets: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Cargo:
    """Pages that transfers move.

    Attributes:
        transfers: [M] which of the plan's X transfers moves the page.
        elsewhere: [M] for a load, the page of the host; else the index of the page in the request.
        pages: [M] the page of the device.
    """

    transfers: Int32Array
    elsewhere: Int32Array
    pages: Int32Array


def _nothing(dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    nothing = np.empty(0, dtype=dtype)
    nothing.flags.writeable = False
    return nothing


_INT32, _INT64, _FLOAT32 = _nothing(np.int32), _nothing(np.int64), _nothing(np.float32)
NO_COUNTS = _INT32
NO_IDS = _INT64
NO_MOVES = Moves(sources=_INT32, targets=_INT32)
NO_CARGO = Cargo(transfers=_INT32, elsewhere=_INT32, pages=_INT32)
NO_TRANSFERS = Transfers(ids=_INT64, requests=_INT64, kinds=_INT32)
NO_CUTS: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """One cache group's part of a step, in the order it is to be done.

    Attributes:
        kind: the number of its `CacheGroupKind`.
        stores: pages of the device copied to pages of the host, before anything else is written.
        loads, handovers: pages of the transfers that begin now.
        copies: states copied before the forward: a recurrence begins as the one it goes on from.
            A row whose context is 0 begins with the state of nothing.
        table_slots, table_indices, table_pages: [D] the page table's changes since the last
            plan: table[slot, index] = page, to be applied in order before the forward. Of a
            recurrent group, entry 0 is the page of the state.
        kv_slots: [T] destination of each token: page * page_size + offset; [0] of a recurrent
            group.
        saves: states copied after the forward, to be kept.
    """

    kind: int = 0
    kv_slots: Int32Array
    table_slots: Int32Array
    table_indices: Int32Array
    table_pages: Int32Array
    stores: Moves = NO_MOVES
    copies: Moves = NO_MOVES
    saves: Moves = NO_MOVES
    loads: Cargo = NO_CARGO
    handovers: Cargo = NO_CARGO

    @property
    def stays(self) -> bool:
        """Whether no page leaves the device, or comes to it from the host."""
        return not (len(self.stores.sources) or len(self.loads.pages))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one forward pass runs: decode rows first, then prefill chunks.

    Attributes:
        step: the step's number; plans are committed in this order.
        decode_count: the first `decode_count` rows are decode rows. The first token of each is
            the last one sampled for the row's slot and lives in the execution plane; its entry
            in `token_ids` is 0 and not to be read. So a step can be planned before the one
            before it is committed. Any tokens after the first are the row's draft: guesses of
            what will be sampled, which stand in `token_ids`. While a row with a draft flies, its
            request is in no later plan: how far it came is not known.
        row_slots: [R] the running slot of each row's request.
        query_starts: [R + 1] row r runs tokens query_starts[r] : query_starts[r + 1].
        context_lens: [R] positions of the row's request already in the KV cache, which is the
            position of the row's first token.
        token_ids: [T] input tokens.
        sample_rows: [S] whose logits are sampled, ascending: a decode row stands here once for
            each of its tokens, in order; a chunk at most once, for its last token. S is at most
            slots_max + step_drafts_max.
        sample_positions: [S] index of the output token about to be sampled (0 for the first):
            the counter of the request's random stream. Consecutive within a row.
        propose_counts: [R] how many tokens the draft model is to propose for the row's request,
            to follow the last sample of the row that counts; 0 for none, as for rows that sample
            nothing. [0] where there is no draft model. Their sum is at most step_proposals_max.
            Until the step is committed a request with a count is in no later plan.
        bound_slots, bound_requests: [B] requests that took a slot since the last plan.
        transfers: transfers that begin now. A plan may begin some and have no rows.
        groups: the KV side, one entry per cache group, in the order of their kinds.
    """

    step: int
    decode_count: int
    row_slots: Int32Array
    query_starts: Int32Array
    context_lens: Int32Array
    token_ids: Int32Array
    sample_rows: Int32Array
    sample_positions: Int32Array
    bound_slots: Int32Array
    bound_requests: Int64Array
    propose_counts: Int32Array = field(default_factory=lambda: NO_COUNTS)
    transfers: Transfers = NO_TRANSFERS
    groups: tuple[GroupPlan, ...]

    @property
    def has_drafts(self) -> bool:
        """Whether a row has a draft."""
        return int(self.query_starts[self.decode_count]) > self.decode_count


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What a step runs, as far as its time depends on it.

    Attributes:
        prefill_tokens: prompt tokens, of all chunks.
        decode_rows: rows that decode.
        draft_tokens: drafted tokens of decode rows, beyond the one that each of them has.
        proposed_tokens: tokens that the draft model proposes, over all rows.
        proposal_rounds: forward passes of the draft model, one after the other: as many as the
            longest proposal has tokens, since all rows that propose run together.
        caught_up_tokens: tokens that the draft model reads before it proposes, beyond the last one
            of each row.
        context_tokens: tokens of KV that attention reads: the contexts of all rows.
        prefill_pairs: what prefill attention visits, the sum over chunks of
            chunk * (context + chunk / 2).
    """

    prefill_tokens: int = 0
    decode_rows: int = 0
    draft_tokens: int = 0
    proposed_tokens: int = 0
    proposal_rounds: int = 0
    caught_up_tokens: int = 0
    context_tokens: int = 0
    prefill_pairs: float = 0.0

    def ran(self, result: "StepResult") -> Self:
        """The same with what the draft model did."""
        counts = np.diff(result.proposed_starts)
        return replace(
            self,
            proposed_tokens=int(counts.sum()),
            proposal_rounds=int(counts.max(initial=0)),
            caught_up_tokens=result.caught_up_tokens,
        )

    @classmethod
    def of(cls, plan: StepPlan) -> Self:
        """The work of a plan, if the draft model proposes all that it is asked for, and has read
        what it needs."""
        decodes = plan.decode_count
        chunks = np.diff(plan.query_starts)[decodes:].astype(np.float64)
        contexts = plan.context_lens[decodes:]
        return cls(
            prefill_tokens=int(chunks.sum()),
            decode_rows=decodes,
            draft_tokens=int(plan.query_starts[decodes]) - decodes,
            proposed_tokens=int(plan.propose_counts.sum()),
            proposal_rounds=int(plan.propose_counts.max(initial=0)),
            context_tokens=int(plan.context_lens.sum(dtype=np.int64)),
            prefill_pairs=float((chunks * (contexts + chunks / 2)).sum()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledLogprobs:
    """Log-probabilities of the rows of a step that asked for them.

    Attributes:
        sample_indices: [L] which of the step's S samples each entry is.
        chosen: [L] log-probability of the sampled token.
        top_token_ids, top_values: [L, k] the k likeliest, k the most any row asked for.
        top_counts: [L] how many of the k that row asked for.
    """

    sample_indices: Int32Array
    chosen: Float32Array
    top_token_ids: Int32Array
    top_values: Float32Array
    top_counts: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one forward pass gave.

    Attributes:
        tokens: [S] what was sampled at each. Sample i of a row counts if the i samples before it
            equal the row's first i drafts; the last that counts is the slot's last token from
            then on. Those that do not count may be any token ids.
        logprobs: where asked for.
        failures: slots whose request cannot go on, and why; their tokens mean nothing.
        proposed_starts: [R + 1] what the draft model proposes for row r's request stands at
            proposed_starts[r] : proposed_starts[r + 1]: no more than the plan's propose_counts[r],
            and less where it knows less. [0] where nothing was asked for.
        proposed_tokens: [P] token ids, to follow the row's last sample that counts, in order.
        proposed_chances: [P] the probability that the draft model gives each, after those before.
        caught_up_tokens: that the draft model read before, beyond the last one of each row that it
            proposed for.
        cuts: slots whose drafts were run in part, because the request's grammar forbids the next
            guess, and how many guesses were; samples behind those may be any token ids.
    """

    tokens: Int32Array
    logprobs: SampledLogprobs | None
    failures: Mapping[int, str] = field(default_factory=dict)
    proposed_starts: Int32Array = field(default_factory=lambda: NO_COUNTS)
    proposed_tokens: Int32Array = field(default_factory=lambda: NO_COUNTS)
    proposed_chances: Float32Array = field(default_factory=lambda: _FLOAT32)
    caught_up_tokens: int = 0
    cuts: Mapping[int, int] = field(default_factory=lambda: NO_CUTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """Where a prompt's tokens came from when it was admitted; the first four add up to it.

    Attributes:
        cached_tokens: from cache.
        evicted_tokens: the cache held them once, as far as it remembers.
        unseen_tokens: it never did, for this tenant.
        tail_tokens: they fill no page, or share one with the last token, which is always computed.
        divergence: so many leading tokens the cache holds or held: the first position at which
            the prompt leaves them, the prompt's length if it does not. Exact while the page that
            differs has a neighbour in cache, else the start of that page.
    """

    cached_tokens: int
    evicted_tokens: int
    unseen_tokens: int
    tail_tokens: int
    divergence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What happened to requests since the last outcome was taken.

    Attributes:
        requests, tokens: [K] a token that belongs to its request's output. A request stands here
            as often as it got tokens, in their order.
        sample_indices: [K] which sample of the committed step it was.
        cached_counts: [K] prompt tokens of the request served from cache at its admission.
        finished, reasons: [F] requests that reached their terminal event, and `FinishReason`s.
        retries_ms: [F] when to try again, for those that were REFUSED; 0 for the others.
        draft_reports: [F, 2] tokens that were drafted for the request, and those of them that
            were accepted: sampled as guessed, and part of its output.
        admitted: [A] requests that took a slot for the first time.
        cache_reports: [A, 5] the fields of their `CacheReport`s.
    """

    requests: Int64Array
    tokens: Int32Array
    sample_indices: Int32Array
    cached_counts: Int32Array
    finished: Int64Array
    reasons: Int32Array
    retries_ms: Int32Array
    draft_reports: Int32Array
    admitted: Int64Array
    cache_reports: Int32Array
