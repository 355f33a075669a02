"""The gRPC service the gateway talks to: `tokenspeed.grpc.scheduler.TokenSpeedScheduler`."""

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
from smg_grpc_proto.generated import common_pb2, tokenspeed_scheduler_pb2_grpc
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed import __version__
from tokenspeed.core.config import STREAM_INTERVAL_MS
from tokenspeed.core.errors import EngineDead, InvalidParameter, Overloaded, TokenSpeedError
from tokenspeed.entrypoint.cache_events import event_messages
from tokenspeed.entrypoint.generation import Generation, GenerationTable, tenant_of
from tokenspeed.entrypoint.history import HistoryStats, TokenHistory
from tokenspeed.entrypoint.loads import loads_response
from tokenspeed.entrypoint.operations.records import RequestBook
from tokenspeed.entrypoint.spelling import TokenSpelling
from tokenspeed.entrypoint.status import status_of
from tokenspeed.entrypoint.tokenizer_archive import archive_chunks

if TYPE_CHECKING:
    from tokenspeed.engine.client import EngineClient

__all__ = ["Servicer", "start_server"]

_log = logging.getLogger(__name__)

# A request of a million tokens and its text; the gateway bounds what a client may send.
_MESSAGE_SIZE_MAX_BYTES = 64 * 1024 * 1024
# An engine deep in one long step answers late and is not dead; one silent for this long is.
_SILENCE_MAX_S = 30.0
_PROBE_TIMEOUT_S = 2.0
_FLUSH_TIMEOUT_MAX_S = 600.0
# Who drains a server has it take requests again, or end, within seconds or minutes.
_DRAINING_RETRY_S = 5.0


class _Shared:
    """What the servicers of one server have in common.

    Attributes:
        salt_key: makes the salts of tenants.
        book: the requests, for the operations port.
        generations: the calls in flight, which write at common ticks.
        history: what was served, so that a conversation may go on at another engine.
        attached: servicers that have an engine.
        draining: whether new requests are refused.
    """

    def __init__(self, stream_interval_s: float) -> None:
        self.salt_key = os.urandom(16)
        self.book = RequestBook()
        self.generations = GenerationTable(stream_interval_s)
        self.history: TokenHistory | None = None
        self.attached: set[Servicer] = set()
        self.draining = False


class Servicer:
    """Every RPC of the service, over whichever engine is attached.

    The servicer outlives engines: while none is attached, calls end with UNAVAILABLE and the
    reason, so that a restarted engine serves on the same port.

    Args:
        token_exact_history: serve what comes back of a conversation as the tokens it was served
            as; see `history`.
        stream_interval_s: the longest time that a token waits to share a message with others of
            its stream while many streams run; see `ticks`.
        beside: another servicer of the same server, for another engine of the same model: all have
            one book of requests, one history and one interval, and drain together.

    Attributes:
        book: the requests, for the operations port.
        ending: whether the server is going down, after which it drains for good.
    """

    def __init__(
        self,
        *,
        token_exact_history: bool = True,
        stream_interval_s: float = STREAM_INTERVAL_MS / 1000,
        beside: "Servicer | None" = None,
    ) -> None:
        self._shared: _Shared = _Shared(stream_interval_s) if beside is None else beside._shared
        self.ending = False
        self._token_exact_history = token_exact_history
        self._client: EngineClient | None = None
        self._absence = "the engine is starting"
        self.book = self._shared.book
        self._generations = self._shared.generations
        self._started_at_s = time.time()
        self._heard_at_s = 0.0
        self._cache_sequence = 0

    def attach(self, client: "EngineClient") -> None:
        """Serve with this engine from now on."""
        self._client = client
        first = not self._shared.attached
        self._shared.attached.add(self)
        if self._token_exact_history and first:
            tokenizer = client.tokenizer
            self._shared.history = TokenHistory(
                TokenSpelling(
                    tokenizer.bytes_of,
                    control=tokenizer.control_token_ids,
                    vocab_size=client.info.vocab_size,
                )
            )
        self._heard_at_s = time.monotonic()

    def detach(self, reason: str) -> None:
        """Answer UNAVAILABLE with this reason from now on; running calls end by themselves."""
        self._client = None
        self._absence = reason
        self._shared.attached.discard(self)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused, with 429 and a time to come back; those that run go
        on."""
        return self._shared.draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self._shared.draining = value

    @property
    def client(self) -> "EngineClient | None":
        """The engine's; None while there is none, for the reason in `absence`."""
        return self._client

    @property
    def absence(self) -> str:
        """Why there was last no engine."""
        return self._absence

    @property
    def running(self) -> int:
        """How many Generate calls are in flight, at all engines of the server."""
        return len(self._generations)

    @property
    def history(self) -> HistoryStats | None:
        """What is remembered of served tokens; None where nothing is."""
        history = self._shared.history
        return None if history is None else history.stats

    def _live(self) -> "EngineClient":
        if self._client is None:
            raise EngineDead(self._absence)
        return self._client

    async def Generate(self, request: Any, context: Any) -> None:  # noqa: N802
        """Stream deltas and one complete message per sample; see `generation.Generation`.

        A gateway whose streaming client went away calls Abort; one whose non-streaming client
        went away cancels this call. Both end the engine's requests.
        """
        try:
            with self.book.observed(request.request_id, tenant_of(request.request_id)) as record:
                if self.draining:
                    raise Overloaded("the server is draining", retry_after_s=_DRAINING_RETRY_S)
                self._generations.check_free(request.request_id)
                generation = Generation(
                    request, self._live(), self._shared.history, salt_key=self._shared.salt_key
                )
                record.begin(generation.prompt, generation.streams)
                with self._generations.listed(generation):
                    await generation.relay(context, self._generations.ticks)
        except Exception as error:
            await _refuse(context, error)

    async def Abort(self, request: Any, context: Any) -> Any:  # noqa: N802
        """End a running Generate call; its stream ends with the reason "abort"."""
        found = self._generations.abort(request.request_id)
        message = "aborted" if found else f"no request with the id {request.request_id!r} runs"
        return pb.AbortResponse(success=found, message=message)

    async def HealthCheck(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Healthy while the engine answers: it is asked for its counters each time."""
        try:
            client = self._live()
            await asyncio.wait_for(client.stats(), _PROBE_TIMEOUT_S)
        except TimeoutError:
            silence_s = time.monotonic() - self._heard_at_s
            if silence_s > _SILENCE_MAX_S:
                return pb.HealthCheckResponse(
                    healthy=False, message=f"the engine has been silent for {silence_s:.0f} s"
                )
            return pb.HealthCheckResponse(healthy=True, message="busy with a long step")
        except TokenSpeedError as error:
            return pb.HealthCheckResponse(healthy=False, message=str(error))
        self._heard_at_s = time.monotonic()
        return pb.HealthCheckResponse(healthy=True, message="ready")

    async def GetModelInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What the gateway needs to know of the model: tokenizer, context, defaults."""
        try:
            info = self._live().info
        except EngineDead as error:
            return await _refuse(context, error)
        response = pb.GetModelInfoResponse(
            model_path=info.model_path,
            tokenizer_path=info.tokenizer_dir,
            served_model_name=info.model_name,
            model_type=info.model_type,
            architectures=[info.architecture],
            max_context_length=info.context_max,
            max_req_input_len=info.context_max - 1,
            vocab_size=info.vocab_size,
            eos_token_ids=info.eos_token_ids,
            default_sampling_params_json=(
                msgspec.json.encode(info.default_sampling).decode() if info.default_sampling else ""
            ),
            model_dtype=info.dtype,
        )
        if info.pad_token_id is not None:
            response.pad_token_id = info.pad_token_id
        if info.bos_token_id is not None:
            response.bos_token_id = info.bos_token_id
        return response

    async def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The engine's configuration and counters."""
        try:
            client = self._live()
            stats = await client.stats()
        except Exception as error:
            return await _refuse(context, error)
        info = client.info
        response = pb.GetServerInfoResponse(
            active_requests=stats.running + stats.waiting,
            is_paused=False,
            uptime_seconds=stats.uptime_s,
            max_total_num_tokens=min(info.pages * info.page_size, 2**31 - 1),
            tokenspeed_version=__version__,
            constrained_decoding="requested",
        )
        response.server_args.update(msgspec.to_builtins(info))
        response.scheduler_info.update(msgspec.to_builtins(stats))
        if (history := self.history) is not None:
            named = {f"history_{name}": value for name, value in asdict(history).items()}
            response.scheduler_info.update(named)
        response.start_time.FromNanoseconds(int(self._started_at_s * 1e9))
        return response

    async def GetLoads(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The engine's load, as least-load routing reads it."""
        try:
            if request.HasField("dp_rank") and request.dp_rank != 0:
                raise InvalidParameter(f"dp_rank is {request.dp_rank}; this engine has rank 0 only")
            client = self._live()
            return loads_response(await client.stats(), client.info, include=request.include)
        except Exception as error:
            return await _refuse(context, error)

    async def FlushCache(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Forget every cached prefix, once the engine is idle or not at all."""
        try:
            timeout_s = request.timeout_s
            if not 0.0 <= timeout_s <= _FLUSH_TIMEOUT_MAX_S:
                raise InvalidParameter(
                    f"timeout_s must be in [0, {_FLUSH_TIMEOUT_MAX_S:g}], but is {timeout_s}"
                )
            done = await self._live().flush_cache(timeout_s)
            if done and self._shared.history is not None:
                self._shared.history.clear()
        except Exception as error:
            return await _refuse(context, error)
        message = "the prefix cache is empty" if done else "requests are running; nothing was done"
        return common_pb2.FlushCacheResponse(success=done, message=message)

    async def StartProfile(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Profile the engine from now on, for `num_steps` steps or until StopProfile."""
        try:
            if request.HasField("start_step") and request.start_step > 0:
                raise InvalidParameter("start_step is not offered: profiling starts at once")
            steps = request.num_steps if request.HasField("num_steps") else None
            if steps is not None and steps < 1:
                raise InvalidParameter(f"num_steps must be at least 1, but is {steps}")
            output_dir = request.output_dir if request.HasField("output_dir") else None
            if output_dir is not None and not Path(output_dir).is_dir():
                raise InvalidParameter(f"output_dir must be a folder that exists: {output_dir!r}")
            path = await self._live().start_profile(output_dir, steps)
        except Exception as error:
            return await _refuse(context, error)
        return common_pb2.ProfileResponse(success=True, message=path)

    async def StopProfile(self, request: Any, context: Any) -> Any:  # noqa: N802
        """End profiling; the message is the path of the trace."""
        try:
            path = await self._live().stop_profile()
        except Exception as error:
            return await _refuse(context, error)
        return common_pb2.ProfileResponse(success=True, message=path)

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """The tokenizer's files as a zip, in chunks; the last one carries its SHA-256."""
        try:
            folder = Path(self._live().info.tokenizer_dir)
            chunks = await asyncio.to_thread(lambda: list(archive_chunks(folder)))
        except Exception as error:
            await _refuse(context, error)
            return
        for data, digest in chunks:
            yield common_pb2.GetTokenizerChunk(data=data, sha256=digest)

    async def SubscribeKvEvents(  # noqa: N802
        self, request: Any, context: Any
    ) -> AsyncIterator[Any]:
        """The content of the prefix cache, then its changes, each with the engine's load."""
        try:
            after = max(self._cache_sequence, request.start_sequence_number)
            async for message in event_messages(self._live(), after=after):
                self._cache_sequence = max(self._cache_sequence, message.sequence_number)
                yield message
        except Exception as error:
            await _refuse(context, error)


async def start_server(servicer: Servicer, *, host: str = "127.0.0.1") -> tuple[Any, int]:
    """Serve on a free port of `host`; the server and the port.

    The port is the kernel's choice and not shared, so that no other process can take calls
    meant for this one.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", _MESSAGE_SIZE_MAX_BYTES),
            ("grpc.max_send_message_length", _MESSAGE_SIZE_MAX_BYTES),
        ]
    )
    tokenspeed_scheduler_pb2_grpc.add_TokenSpeedSchedulerServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"{host}:0")
    await server.start()
    return server, port


async def _refuse(context: Any, error: Exception) -> None:
    """End a call with the status of an error. Never returns normally."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    code, message = status_of(error)
    if code is grpc.StatusCode.INTERNAL:
        _log.exception("a call failed", exc_info=error)
    if isinstance(error, Overloaded):
        context.set_trailing_metadata((("retry-after", str(math.ceil(error.retry_after_s))),))
    await context.abort(code, message)
