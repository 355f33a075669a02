"""One Generate call: its engine requests, and the messages made of what they yield."""

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed.core.config import STREAM_INTERVAL_MS
from tokenspeed.core.errors import EngineError, InvalidParameter
from tokenspeed.core.step import FinishReason
from tokenspeed.entrypoint.chunks import ChunkCutter
from tokenspeed.entrypoint.history import Prompt, TokenHistory, served_tokens_max
from tokenspeed.entrypoint.opening import StreamOpening
from tokenspeed.entrypoint.sampling import (
    check_supported,
    samples_of,
    sampling_params_of,
    seeded,
)
from tokenspeed.entrypoint.ticks import WriteTicks

if TYPE_CHECKING:
    from tokenspeed.engine.client import EngineClient
    from tokenspeed.engine.stream import TokenDelta, TokenLogprob, TokenStream

__all__ = ["Generation", "GenerationTable", "salt_of", "tenant_of"]

# The ending is a UUID.
_TENANT = re.compile(r"tenant=([^/]+)(?:/.*)?-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")

_FINISH_WORDS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


class Generation:
    """The engine requests of one `GenerateRequest`, one per sample.

    Args:
        request: what the gateway asks for.
        client: of the engine.
        history: what was served before, to be served alike; None to serve prompts as they come.
        salt_key: makes the salts of tenants, which nobody outside can foresee.

    Attributes:
        prompt: [T] int32, the tokens that are served.

    Raises:
        RequestError: the request is wrong; nothing runs in the engine then.
        EngineDead: there is no engine.
    """

    def __init__(
        self,
        request: Any,
        client: "EngineClient",
        history: TokenHistory | None = None,
        *,
        salt_key: bytes = b"",
    ) -> None:
        check_supported(request)
        params = sampling_params_of(
            request,
            defaults=client.info.default_sampling,
            context_max=client.info.context_max,
        )
        samples = samples_of(request)
        tenant = tenant_of(request.request_id)
        ids = np.array(request.tokenized.input_ids, dtype=np.int64)
        self._history = history
        self._prompt = Prompt(ids, len(ids))
        if history is not None:
            most = served_tokens_max(len(ids), params, client.info)
            self._prompt = history.recall(ids, tenant=tenant, tokens_max=most)
        self.request_id: str = request.request_id
        self.prompt = self._prompt.ids
        self._streamed = bool(request.stream)
        self._keeps_stop_token = bool(request.sampling_params.no_stop_trim)
        self._marks = client.tokenizer.control_token_ids
        self._streams: list[TokenStream] = []
        try:
            for index in range(samples):
                own = (
                    params
                    if index == 0
                    else msgspec.structs.replace(params, seed=seeded(params.seed, index))
                )
                self._streams.append(
                    client.generate(
                        self._prompt.ids, own, salt=salt_of(tenant, salt_key), tenant=tenant
                    )
                )
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """End every sample that still runs; those streams end with the reason "abort"."""
        for stream in self._streams:
            stream.abort()

    @property
    def streams(self) -> "tuple[TokenStream, ...]":
        """One for each sample."""
        return tuple(self._streams)

    @property
    def samples(self) -> int:
        """How many streams the call has."""
        return len(self._streams)

    async def relay(self, context: Any, ticks: WriteTicks) -> None:
        """Write every message of the call, then return.

        However it ends, no engine request outlives it.

        Args:
            context: the gRPC call.
            ticks: when messages that are neither a stream's first nor its last are written.

        Raises:
            EngineDead: the engine died meanwhile.
            InvalidParameter: the prompt can never fit the KV cache.
            Overloaded: the request would have waited for too long.
        """
        opening = StreamOpening(context) if self._streamed else None
        write_one = context.write if opening is None else opening.write
        try:
            if len(self._streams) == 1:
                await self._relay_sample(0, write_one, ticks)
                return
            # A gRPC call takes one write at a time; the samples take turns.
            turn = asyncio.Lock()

            async def write(message: Any) -> None:
                async with turn:
                    await write_one(message)

            try:
                async with asyncio.TaskGroup() as group:
                    for index in range(len(self._streams)):
                        group.create_task(self._relay_sample(index, write, ticks))
            except* Exception as failures:
                raise _first(failures) from None
        finally:
            self.abort()
            if opening is not None:
                await opening.close()

    async def _relay_sample(self, index: int, write: Any, ticks: WriteTicks) -> None:
        sampled: list[int] = []
        try:
            await self._relay_deltas(index, write, ticks, sampled)
        finally:
            if self._history is not None:
                self._history.remember(self._prompt, sampled)

    async def _relay_deltas(
        self, index: int, write: Any, ticks: WriteTicks, sampled: list[int]
    ) -> None:
        stream = self._streams[index]
        # Counted in the tokens that the gateway sent: what a client's usage says of a prompt hangs
        # neither on what was served before nor on who asks for its count.
        prompt_tokens = self._prompt.sent_tokens
        output_ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        cutter = ChunkCutter(self._marks)
        async for delta in stream:
            sent_before = len(sampled)
            sampled += delta.token_ids
            completion_tokens = len(sampled)
            cached_tokens = self._prompt.in_sent_tokens(delta.cached_tokens)
            ids = self._visible(delta)
            output_ids += ids
            if delta.logprobs is not None:
                logprobs += delta.logprobs[: len(ids)]
            for part in cutter.cut(ids) if self._streamed else ():
                chunk = pb.GenerateStreamChunk(
                    token_ids=ids[part],
                    prompt_tokens=prompt_tokens,
                    completion_tokens=(
                        completion_tokens if part.stop == len(ids) else sent_before + part.stop
                    ),
                    cached_tokens=cached_tokens,
                    index=index,
                )
                if delta.logprobs is not None:
                    _fill_logprobs(chunk.output_logprobs, ids[part], delta.logprobs[part])
                await write(pb.GenerateResponse(request_id=self.request_id, chunk=chunk))
            if delta.finish_reason is None:
                await ticks.rest(stream)
                continue
            if delta.finish_reason == FinishReason.REJECTED:
                raise InvalidParameter(
                    f"the request of {prompt_tokens} prompt tokens can never fit the KV cache. "
                    "Shorten it, or serve with a larger --kv-cache-memory."
                )
            complete = pb.GenerateComplete(
                output_ids=output_ids,
                finish_reason=_FINISH_WORDS[delta.finish_reason],
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                cached_tokens=cached_tokens,
                index=index,
                spec_draft_tokens=stream.drafted_tokens,
                spec_accepted_tokens=stream.accepted_tokens,
            )
            if delta.stop_string is not None:
                complete.finish_reason = "stop"
                complete.matched_stop_str = delta.stop_string
            elif delta.stop_token_id is not None:
                complete.matched_token_id = delta.stop_token_id
            if logprobs:
                _fill_logprobs(complete.output_logprobs, output_ids, logprobs)
            await write(pb.GenerateResponse(request_id=self.request_id, complete=complete))
            return
        raise EngineError("the engine ended a request without saying why")

    def _visible(self, delta: "TokenDelta") -> list[int]:
        """The tokens a client is to see: a stop token is the last one, and no part of the text."""
        ids = delta.token_ids
        if delta.stop_token_id is None or self._keeps_stop_token or not ids:
            return ids
        return ids[:-1] if ids[-1] == delta.stop_token_id else ids


class GenerationTable:
    """The calls in flight, by the id the gateway gave them, so that an Abort finds its call.

    Args:
        stream_interval_s: the longest time that a token waits to share a message.

    Attributes:
        ticks: when their streams write.
    """

    def __init__(self, stream_interval_s: float = STREAM_INTERVAL_MS / 1000) -> None:
        self.ticks = WriteTicks(stream_interval_s)
        self._live: dict[str, Generation] = {}

    def __len__(self) -> int:
        return len(self._live)

    def check_free(self, request_id: str) -> None:
        """Raises InvalidParameter when there is no id, or a call with it is in flight: an Abort
        of one would end the other."""
        if not request_id:
            raise InvalidParameter("request_id is empty; a call must be found to be aborted")
        if request_id in self._live:
            raise InvalidParameter(f"a request with the id {request_id!r} is in flight already")

    @contextlib.contextmanager
    def listed(self, generation: Generation) -> Iterator[None]:
        """Keep a call findable while it runs."""
        self._live[generation.request_id] = generation
        self.ticks.streams += generation.samples
        try:
            yield
        finally:
            self.ticks.streams -= generation.samples
            del self._live[generation.request_id]

    def abort(self, request_id: str) -> bool:
        """End a call; False when there is none with this id, as when it has just finished."""
        generation = self._live.get(request_id)
        if generation is None:
            return False
        generation.abort()
        return True


def tenant_of(request_id: str) -> str | None:
    """The tenant that a client named in its `x-request-id: tenant=NAME` or `tenant=NAME/...`.

    That header is the one word of a client that the gateway hands on besides the request itself;
    it comes with a unique ending. None where no tenant was named.
    """
    named = _TENANT.match(request_id)
    return named[1] if named else None


def salt_of(tenant: str | None, key: bytes) -> int:
    """The 64-bit salt of a tenant's cached prompts, so that no tenant finds another's by how soon
    an answer comes. Those who name no tenant share one."""
    if tenant is None:
        return 0
    return int.from_bytes(hashlib.blake2b(tenant.encode(), digest_size=8, key=key).digest())


def _fill_logprobs(target: Any, ids: list[int], logprobs: "list[TokenLogprob]") -> None:
    target.token_ids.extend(ids)
    for entry in logprobs[: len(ids)]:
        target.token_logprobs.append(entry.logprob)
        target.top_logprobs.add(values=entry.top_logprobs, token_ids=entry.top_token_ids)


def _first(failures: BaseExceptionGroup[Exception]) -> Exception:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
