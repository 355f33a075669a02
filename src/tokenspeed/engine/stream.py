"""A request's tokens on their way to whoever asked for them."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tokenspeed.core.errors import Overloaded
from tokenspeed.core.step import CacheReport, FinishReason
from tokenspeed.engine.facts import RequestTimes
from tokenspeed.engine.wire import LogprobColumns, StepOutputs, request_times

__all__ = ["StopStrings", "StreamTable", "TokenDelta", "TokenLogprob", "TokenStream"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a sampled token, and of the likeliest beside it, likeliest first."""

    logprob: float
    top_token_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class TokenDelta:
    """Tokens generated since the last delta.

    Attributes:
        token_ids: the new tokens; a stop token that ended the text is the last of them.
        logprobs: one entry a token, or None where none were asked for.
        cached_tokens: prompt tokens that came from the prefix cache.
        finish_reason: set on the last delta of a stream, and only there.
        stop_token_id, stop_string: what ended the text, where one of them did.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    stop_string: str | None = None


class Detokenizer(Protocol):
    """Text of tokens, as far as it is certain."""

    def push(self, ids: list[int]) -> str:
        """The text that these tokens complete."""


class StopStrings:
    """Watches a text for the first of some strings, across the borders of its pieces.

    Args:
        stops: the strings.
        detokenizer: turns token ids into text.
    """

    def __init__(self, stops: tuple[str, ...], detokenizer: Detokenizer) -> None:
        self._stops = stops
        self._detokenizer = detokenizer
        self._tail = ""
        self._tail_chars = max(map(len, stops)) - 1

    def push(self, token_id: int) -> str | None:
        """Take one more token. The string whose first occurrence it completes, if any."""
        text = self._tail + self._detokenizer.push([token_id])
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            return min(found)[1]
        self._tail = text[-self._tail_chars :] if self._tail_chars else ""
        return None


class TokenStream:
    """The output of one request: an asynchronous iterator of `TokenDelta`.

    It ends after the delta that carries a finish reason. Tokens that arrive while nobody waits
    are merged into one delta. Leaving the iteration early does not end the request: call `abort`.
    `cache` says where the prompt came from, and is there with the first delta.

    Attributes:
        tokens: how many came so far.
        first_token_s, ended_s: when the first came and when the end did, by the monotonic clock.
        finish_reason: how the stream ended; None while it has not, and where an error ended it.
        times: where its time went in the engine; there when the engine is through with it, which
            is a moment after the end of a stream that was ended on this side.
        drafted_tokens, accepted_tokens: guesses that the engine verified for it so far, and those
            that were right.
    """

    def __init__(
        self,
        *,
        request: int,
        prompt_tokens: int,
        stop_strings: StopStrings | None,
        abort: Callable[[], None],
    ) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.tokens = 0
        self.first_token_s: float | None = None
        self.ended_s: float | None = None
        self.finish_reason: FinishReason | None = None
        self.times: RequestTimes | None = None
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self._before_drafts = (0, 0)
        self.cache: CacheReport | None = None
        self.done = False
        self._stop_strings = stop_strings
        self._abort = abort
        self._pending: TokenDelta | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._rester: asyncio.Future[None] | None = None

    def abort(self) -> None:
        """End the request; the stream ends with finish reason ABORT, if it had not ended yet."""
        if not self.done:
            self._abort()
            self.push_end(FinishReason.ABORT)

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """Take note of the request's guesses so far, before the tokens of the step that verified
        the last of them."""
        if not self.done:
            self._before_drafts = self.tokens, self.accepted_tokens
            self.drafted_tokens, self.accepted_tokens = drafted, accepted

    def push(self, token_id: int, cached_tokens: int, *, is_stop: bool = False) -> None:
        """Add a token. One that completes a stop string ends the stream and the request.

        Args:
            token_id: the token.
            cached_tokens: prompt tokens that came from the prefix cache.
            is_stop: whether it is a stop token, whose text is no part of the output.
        """
        if self.done:
            return
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        self.tokens += 1
        delta = self._delta()
        delta.token_ids.append(token_id)
        delta.cached_tokens = cached_tokens
        if self._stop_strings is not None and not is_stop:
            delta.stop_string = self._stop_strings.push(token_id)
            if delta.stop_string is not None:
                delta.finish_reason = self.finish_reason = FinishReason.STOP
                # Right guesses are a step's first tokens; those behind the string are dropped.
                tokens, accepted = self._before_drafts
                self.accepted_tokens = min(self.accepted_tokens, accepted + self.tokens - tokens)
                self._end()
                self._abort()
        self._wake()

    def push_logprob(self, logprob: TokenLogprob) -> None:
        """Add the log-probability of the next token that has none yet."""
        if self.done:
            return
        delta = self._delta()
        if delta.logprobs is None:
            delta.logprobs = []
        delta.logprobs.append(logprob)

    def push_end(self, reason: FinishReason, *, stop_token_id: int | None = None) -> None:
        """End the stream."""
        if self.done:
            return
        self._end()
        delta = self._delta()
        delta.finish_reason = self.finish_reason = reason
        delta.stop_token_id = stop_token_id
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an error."""
        if self.done:
            return
        self._end()
        self._error = error
        self._wake()

    async def rest(self) -> None:
        """Let tokens gather until `end_rest`, or until the stream ends."""
        if self.done:
            return
        self._rester = asyncio.get_running_loop().create_future()
        try:
            await self._rester
        finally:
            self._rester = None

    def end_rest(self) -> None:
        """Wake who rests, if anybody does."""
        _release(self._rester)

    def take(self) -> TokenDelta | None:
        """What has arrived, without waiting. Raises the error that ended the stream."""
        if self._pending is None and self._error is not None:
            raise self._error
        delta, self._pending = self._pending, None
        return delta

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        return self

    async def __anext__(self) -> TokenDelta:
        while (delta := self.take()) is None:
            if self.done:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return delta

    def _delta(self) -> TokenDelta:
        if self._pending is None:
            self._pending = TokenDelta()
        return self._pending

    def _end(self) -> None:
        self.done = True
        self.ended_s = time.monotonic()
        self.end_rest()

    def _wake(self) -> None:
        _release(self._waiter)


def _release(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class StreamTable:
    """The open streams of an engine, by request, and the way of a step's outputs to them."""

    def __init__(self) -> None:
        self._streams: dict[int, TokenStream] = {}

    def __contains__(self, request: int) -> bool:
        return request in self._streams

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, request: int, stream: TokenStream) -> None:
        """Open a request's stream."""
        self._streams[request] = stream

    def fail(self, request: int, error: Exception) -> None:
        """End one stream with an error."""
        if (stream := self._streams.pop(request, None)) is not None:
            stream.fail(error)

    def fail_all(self, error: Exception) -> None:
        """End every stream with an error."""
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()

    def take(self, outputs: StepOutputs) -> None:
        """Give a step's tokens to their streams, and end those that ended."""
        requests = memoryview(outputs.requests).cast("q").tolist()
        tokens = memoryview(outputs.tokens).cast("i").tolist()
        cached = memoryview(outputs.cached_counts).cast("i").tolist()
        entries = zip(requests, tokens, cached, strict=True)
        if outputs.drafts:
            self._count(outputs.drafts)
        if not outputs.admitted and not outputs.finished and outputs.logprobs is None:
            # Nearly every step is one of these, and the rest below takes as long as 16 tokens do.
            self._push(entries)
            return
        finished = np.frombuffer(outputs.finished, dtype=np.int64).tolist()
        reasons = np.frombuffer(outputs.reasons, dtype=np.int32).tolist()
        retries = np.frombuffer(outputs.retries_ms, dtype=np.int32).tolist()
        for request, report in _cache_reports(outputs):
            if (stream := self._streams.get(request)) is not None:
                stream.cache = report
        stop_tokens: dict[int, int | None] = {
            request: None
            for request, reason in zip(finished, reasons, strict=True)
            if reason == FinishReason.STOP
        }
        logprobs = {} if outputs.logprobs is None else dict(_logprobs(outputs.logprobs))
        # Of several tokens of a request the last one is the stop token.
        last_of = {request: entry for entry, request in enumerate(requests)}
        for entry, (request, token, count) in enumerate(entries):
            if (stream := self._streams.get(request)) is not None:
                stop = request in stop_tokens and entry == last_of[request]
                if stop:
                    stop_tokens[request] = token
                # Behind a stop string nothing counts, so each goes in with its token.
                if entry in logprobs:
                    stream.push_logprob(logprobs[entry])
                stream.push(token, count, is_stop=stop)
        times = request_times(outputs)
        drafts = np.frombuffer(outputs.draft_reports, dtype=np.int32).reshape(-1, 2).tolist()
        for request, reason, retry_ms, spent, (drafted, accepted) in zip(
            finished, reasons, retries, times, drafts, strict=True
        ):
            if (stream := self._streams.pop(request, None)) is None:
                continue
            stream.times = spent
            stream.drafted_tokens, stream.accepted_tokens = drafted, accepted
            if reason == FinishReason.REFUSED:
                stream.fail(_refusal(retry_ms / 1000))
            else:
                stream.push_end(FinishReason(reason), stop_token_id=stop_tokens.get(request))

    def _count(self, drafts: bytes) -> None:
        for request, drafted, accepted in np.frombuffer(drafts, np.int64).reshape(-1, 3).tolist():
            if (stream := self._streams.get(request)) is not None:
                stream.count_drafts(drafted, accepted)

    def _push(self, entries: Iterable[tuple[int, int, int]]) -> None:
        for request, token, cached_tokens in entries:
            if (stream := self._streams.get(request)) is not None:
                stream.push(token, cached_tokens)


def _refusal(retry_after_s: float) -> Overloaded:
    return Overloaded(
        "the engine is busy: the request would wait for longer than --queue-timeout allows; "
        f"retry after {math.ceil(retry_after_s)} s",
        retry_after_s=retry_after_s,
    )


def _cache_reports(outputs: StepOutputs) -> Iterator[tuple[int, CacheReport]]:
    admitted = np.frombuffer(outputs.admitted, dtype=np.int64).tolist()
    rows = np.frombuffer(outputs.cache_reports, dtype=np.int32).reshape(len(admitted), 5).tolist()
    for request, (cached, evicted, unseen, tail, divergence) in zip(admitted, rows, strict=True):
        yield (
            request,
            CacheReport(
                cached_tokens=cached,
                evicted_tokens=evicted,
                unseen_tokens=unseen,
                tail_tokens=tail,
                divergence=divergence,
            ),
        )


def _logprobs(columns: LogprobColumns) -> list[tuple[int, TokenLogprob]]:
    entries = np.frombuffer(columns.entries, dtype=np.int32).tolist()
    chosen = np.frombuffer(columns.chosen, dtype=np.float32).tolist()
    counts = np.frombuffer(columns.top_counts, dtype=np.int32).tolist()
    shape = (len(entries), columns.width)
    ids = np.frombuffer(columns.top_token_ids, dtype=np.int32).reshape(shape).tolist()
    values = np.frombuffer(columns.top_values, dtype=np.float32).reshape(shape).tolist()
    return [
        (entry, TokenLogprob(logprob, row_ids[:count], row_values[:count]))
        for entry, logprob, count, row_ids, row_values in zip(
            entries, chosen, counts, ids, values, strict=True
        )
    ]
