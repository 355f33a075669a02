"""The values that cross between the control plane and the execution plane, once per step.

Legend of sizes: R rows, T tokens, S sampled rows, B slots newly bound, D page-table entries
written, K events.
"""

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["FinishReason", "GroupPlan", "SampledLogprobs", "StepOutcome", "StepPlan", "StepResult"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """Where one cache group's KV goes in a step.

    Attributes:
        kv_slots: [T] destination of each token: page * page_size + offset.
        table_slots, table_indices, table_pages: [D] the page table's changes since the last
            plan: table[slot, index] = page, to be applied in order before the forward.
    """

    kv_slots: Int32Array
    table_slots: Int32Array
    table_indices: Int32Array
    table_pages: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one forward pass runs: decode rows first, then prefill chunks.

    Attributes:
        step: the step's number; plans are committed in this order.
        decode_count: the first `decode_count` rows are decode rows: one token each, which is the
            last token sampled for the row's slot and lives in the execution plane; their entry
            in `token_ids` is 0 and not to be read. So a step can be planned before the one
            before it is committed.
        row_slots: [R] the running slot of each row's request.
        query_starts: [R + 1] row r runs tokens query_starts[r] : query_starts[r + 1].
        context_lens: [R] positions of the row's request already in the KV cache, which is the
            position of the row's first token.
        token_ids: [T] input tokens.
        sample_rows: [S] rows whose last token's logits are sampled, ascending.
        sample_positions: [S] index of the output token about to be sampled (0 for the first):
            the counter of the request's random stream.
        bound_slots, bound_requests: [B] requests that took a slot since the last plan.
        groups: the KV side, one entry per cache group.
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
    groups: tuple[GroupPlan, ...]


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
    """What one forward pass gave: tokens [S], and log-probabilities where asked for."""

    tokens: Int32Array
    logprobs: SampledLogprobs | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What happened to requests since the last outcome was taken.

    Attributes:
        requests, tokens: [K] a token that belongs to its request's output.
        sample_indices: [K] which sample of the committed step it was.
        cached_counts: [K] prompt tokens of the request served from cache at its admission.
        finished, reasons: [F] requests that reached their terminal event, and `FinishReason`s.
    """

    requests: Int64Array
    tokens: Int32Array
    sample_indices: Int32Array
    cached_counts: Int32Array
    finished: Int64Array
    reasons: Int32Array
