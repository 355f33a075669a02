"""The messages between a client and an engine process: msgpack over a Unix-domain ZeroMQ pair.

Token arrays travel as raw little-endian bytes in columns, one message a step, so that the engine
makes no Python object per request.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from tokenspeed.core import errors
from tokenspeed.core.errors import EngineError, TokenSpeedError
from tokenspeed.core.records import Record, decoder, encode
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import Int64Array, SampledLogprobs, StepOutcome
from tokenspeed.engine.facts import EngineInfo, EngineStats, LiveRequest, RequestTimes
from tokenspeed.engine.ledger import TIMES_COLUMNS

__all__ = [
    "Abort",
    "Begun",
    "CacheEventBatch",
    "Call",
    "Failed",
    "Found",
    "FromEngine",
    "LoadProgress",
    "LogprobColumns",
    "Ready",
    "Refused",
    "Reply",
    "Shutdown",
    "StepOutputs",
    "Submit",
    "ToEngine",
    "decode_from_engine",
    "decode_to_engine",
    "encode",
    "endpoint",
    "error_of",
    "live_requests",
    "request_times",
]


class Submit(Record, frozen=True, tag="submit", array_like=True):
    """Run a request.

    Attributes:
        prompt: int32 token ids.
        seed: the request's own.
        tenant: 64-bit number of whoever shares its turns; None for that of the salt.
        sent_us: when it was sent, by the machine's monotonic clock; None for when it is taken.
    """

    request: int
    prompt: bytes
    params: SamplingParams
    max_new_tokens: int
    seed: int | None
    salt: int
    priority: int
    tenant: int | None
    sent_us: int | None = None


class Abort(Record, frozen=True, tag="abort", array_like=True):
    """End a request; unknown ones are ignored, for it may have finished meanwhile."""

    request: int


class Call(Record, frozen=True, tag="call", array_like=True):
    """Ask for something that is answered by one `Reply` with the same number."""

    number: int
    method: str
    arguments: dict[str, str | int | bool | None]


class Shutdown(Record, frozen=True, tag="shutdown", array_like=True):
    """End the engine process."""


class Begun(Record, frozen=True, tag="begun", array_like=True):
    """The engine process lives; a model is about to be loaded."""


class Found(Record, frozen=True, tag="found", array_like=True):
    """The model's files are there; its tokenizer can be read while the weights are."""

    tokenizer_dir: str


class LoadProgress(Record, frozen=True, tag="progress", array_like=True):
    """How far a stage of the start has come, in units of the stage (bytes, tensors, packages)."""

    stage: str
    done: int
    total: int | None
    unit: str


class Ready(Record, frozen=True, tag="ready", array_like=True):
    """The engine takes requests."""

    info: EngineInfo


class Failed(Record, frozen=True, tag="failed", array_like=True):
    """The engine ends. `kind` names the class of the error in `tokenspeed.core.errors`."""

    kind: str
    message: str


class Refused(Record, frozen=True, tag="refused", array_like=True):
    """A request was wrong in a way only the engine could see."""

    request: int
    kind: str
    message: str


class LogprobColumns(Record, frozen=True, array_like=True):
    """Log-probabilities of some tokens of a `StepOutputs`.

    Attributes:
        entries: int32 [L], ascending: which token of the message.
        chosen: float32 [L].
        top_token_ids, top_values: int32 and float32 [L, width].
        top_counts: int32 [L], how many of `width` the request asked for.
    """

    entries: bytes
    chosen: bytes
    top_token_ids: bytes
    top_values: bytes
    top_counts: bytes
    width: int


class StepOutputs(Record, frozen=True, tag="step", array_like=True):
    """What a step gave its requests.

    Attributes:
        requests, tokens, cached_counts: int64, int32, int32 [K], one entry a token; a request's
            tokens stand in their order.
        finished, reasons: int64, int32 [F], requests that ended and `FinishReason`s.
        retries_ms: int32 [F], when to try again where the reason is REFUSED.
        draft_reports: int32 [F, 2], tokens drafted for the request and those accepted.
        admitted, cache_reports: int64 [A], int32 [A, 5], as in `core.step.StepOutcome`.
        times: int64 [F, 8], as `engine.ledger.Ledger.close` gives them.
        drafts: int64 [D, 3], as `engine.ledger.Ledger.take_drafts` gives them: who ends its stream
            itself, on a stop string, has its account so far.
    """

    requests: bytes
    tokens: bytes
    cached_counts: bytes
    finished: bytes = b""
    reasons: bytes = b""
    retries_ms: bytes = b""
    draft_reports: bytes = b""
    admitted: bytes = b""
    cache_reports: bytes = b""
    times: bytes = b""
    logprobs: LogprobColumns | None = None
    drafts: bytes = b""

    @classmethod
    def of(
        cls,
        outcome: StepOutcome,
        *,
        times: Int64Array | None,
        drafts: Int64Array | None,
        logprobs: SampledLogprobs | None,
    ) -> Self:
        """What became of a step; `times` where a request ended, `drafts` where some had any."""
        columns = None if logprobs is None else _columns(outcome, logprobs)
        if times is None and not len(outcome.admitted):
            # Nearly every step is one of these.
            return cls(
                requests=outcome.requests.tobytes(),
                tokens=outcome.tokens.tobytes(),
                cached_counts=outcome.cached_counts.tobytes(),
                logprobs=columns,
                drafts=b"" if drafts is None else drafts.tobytes(),
            )
        return cls(
            requests=outcome.requests.tobytes(),
            tokens=outcome.tokens.tobytes(),
            cached_counts=outcome.cached_counts.tobytes(),
            finished=outcome.finished.tobytes(),
            reasons=outcome.reasons.tobytes(),
            retries_ms=outcome.retries_ms.tobytes(),
            draft_reports=outcome.draft_reports.tobytes(),
            admitted=outcome.admitted.tobytes(),
            cache_reports=outcome.cache_reports.tobytes(),
            times=b"" if times is None else times.tobytes(),
            logprobs=columns,
            drafts=b"" if drafts is None else drafts.tobytes(),
        )


class CacheEventBatch(Record, frozen=True, tag="cache", array_like=True):
    """Changes of the prefix cache.

    Attributes:
        sequence: 1 for the first batch, counting up.
        kinds: int32 [K]: 0 a page was stored, 1 removed, 2 everything was cleared.
        hashes, parents: int64 [K]; `has_parent` bool [K].
        tokens: int32 [stored pages * page_size], of the stored pages in order.
    """

    sequence: int
    kinds: bytes
    hashes: bytes
    parents: bytes
    has_parent: bytes
    tokens: bytes


class Reply(Record, frozen=True, tag="reply", array_like=True):
    """The answer to a `Call`: `value`, or the kind and text of an error."""

    number: int
    value: EngineStats | bool | str | list[list[int]] | None
    error_kind: str | None = None
    error_message: str | None = None


ToEngine = Submit | Abort | Call | Shutdown
FromEngine = (
    Begun | Found | LoadProgress | Ready | Failed | Refused | StepOutputs | CacheEventBatch | Reply
)


def decode_to_engine(data: bytes) -> ToEngine:
    """A message that a client sent. Raises msgspec.DecodeError on anything else."""
    message: ToEngine = _to_engine()(data)
    return message


def decode_from_engine(data: bytes) -> FromEngine:
    """A message that an engine sent. Raises msgspec.DecodeError on anything else."""
    message: FromEngine = _from_engine()(data)
    return message


@cache
def _to_engine() -> Callable[[bytes], Any]:
    return decoder(ToEngine)


@cache
def _from_engine() -> Callable[[bytes], Any]:
    return decoder(FromEngine)


def request_times(outputs: StepOutputs) -> Iterator[RequestTimes]:
    """Where the time of each request went that ended in a step, in their order."""
    for row in np.frombuffer(outputs.times, dtype=np.int64).reshape(-1, TIMES_COLUMNS).tolist():
        *phases, first_us, ended_us = row
        yield _times(phases, first_us or None, ended_us)


def live_requests(rows: list[list[int]]) -> list[LiveRequest]:
    """What `engine.ledger.Ledger.live` told, [N, 12]."""
    found = []
    for request, *phases, tokens, interval_us, floor_interval_us, drafted, accepted in rows:
        found.append(
            LiveRequest(
                request=request,
                times=_times(phases, None, None),
                tokens=tokens,
                interval_us=interval_us or None,
                floor_interval_us=floor_interval_us or None,
                drafted_tokens=drafted,
                accepted_tokens=accepted,
            )
        )
    return found


def _times(phases: list[int], first_us: int | None, ended_us: int | None) -> RequestTimes:
    constraint_us, queue_us, restore_us, prefill_us, stall_us, decode_us = phases
    return RequestTimes(
        constraint_us=constraint_us,
        queue_us=queue_us,
        restore_us=restore_us,
        prefill_us=prefill_us,
        stall_us=stall_us,
        decode_us=decode_us,
        first_token_at_us=first_us,
        ended_at_us=ended_us,
    )


def endpoint(socket_path: Path) -> str:
    """The ZeroMQ address of a Unix-domain socket."""
    return f"ipc://{socket_path}"


def error_of(kind: str, text: str) -> TokenSpeedError:
    """The error a message names; one of an unknown kind is the engine's own failure."""
    if kind == errors.Overloaded.__name__:
        return errors.Overloaded(text, retry_after_s=1.0)
    if kind in errors.__all__:
        return getattr(errors, kind)(text)  # type: ignore[no-any-return]
    return EngineError(f"{kind}: {text}")


def _columns(outcome: StepOutcome, logprobs: SampledLogprobs) -> LogprobColumns:
    """The log-probabilities of the step's tokens that belong to an output, by token."""
    # Both index arrays ascend; samples of requests that ended meanwhile have no token.
    kept, entries, rows = np.intersect1d(
        outcome.sample_indices, logprobs.sample_indices, assume_unique=True, return_indices=True
    )
    assert len(kept) == len(entries) == len(rows)
    order = np.argsort(entries)
    entries, rows = entries[order], rows[order]
    return LogprobColumns(
        entries=entries.astype(np.int32).tobytes(),
        chosen=logprobs.chosen[rows].tobytes(),
        top_token_ids=logprobs.top_token_ids[rows].tobytes(),
        top_values=logprobs.top_values[rows].tobytes(),
        top_counts=logprobs.top_counts[rows].tobytes(),
        width=logprobs.top_token_ids.shape[1],
    )
