"""The asynchronous client of an engine process. Imports no torch."""

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tokenspeed import loader
from tokenspeed.core.errors import EngineDead, EngineError
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.engine.client_socket import ClientSocket
from tokenspeed.engine.facts import EngineInfo, EngineStats, LiveRequest
from tokenspeed.engine.stream import StopStrings, StreamTable, TokenStream
from tokenspeed.engine.validation import checked_max_new_tokens, checked_prompt
from tokenspeed.engine.wire import (
    Abort,
    Begun,
    CacheEventBatch,
    Call,
    Failed,
    Found,
    FromEngine,
    LoadProgress,
    Ready,
    Refused,
    Reply,
    Shutdown,
    StepOutputs,
    Submit,
    ToEngine,
    decode_from_engine,
    encode,
    error_of,
    live_requests,
)

__all__ = ["EngineClient"]

ProgressCallback = Callable[[LoadProgress], None]


class EngineClient:
    """Speaks to one engine process over its socket.

    Made by `connect`. Every open stream ends with `EngineDead` once the engine is known dead;
    whoever watches the process says so through `fail`.

    Attributes:
        info: what the engine told of itself when it became ready.
        tokenizer: the model's.
        messages: how many messages the engine has sent since then.
    """

    def __init__(
        self,
        socket: ClientSocket,
        info: EngineInfo,
        tokenizer: loader.Tokenizer,
        *,
        first_request: int = 1,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.messages = 0
        self._socket = socket
        self._streams = StreamTable()
        self._calls: dict[
            int, asyncio.Future[EngineStats | bool | str | list[list[int]] | None]
        ] = {}
        self._cache_queues: list[asyncio.Queue[CacheEventBatch | None]] = []
        self._numbers = itertools.count(first_request)
        self._dead: EngineDead | None = None
        socket.listen(self._receive)

    @classmethod
    async def connect(
        cls,
        socket_path: Path,
        *,
        timeout_s: float | None = None,
        on_progress: ProgressCallback | None = None,
        first_request: int = 1,
    ) -> "EngineClient":
        """Connect and wait until the engine is ready.

        Args:
            socket_path: the engine's Unix-domain socket; it need not exist yet.
            timeout_s: the longest silence of the engine before it is given up; None for ever.
            on_progress: called as the model loads.
            first_request: from which requests are numbered, so that several engines' can be told
                apart.

        Raises:
            EngineDead: the engine was silent for too long.
            TokenSpeedError: the engine's own reason not to start.
        """
        socket = ClientSocket(socket_path)
        inbox: asyncio.Queue[bytes] = asyncio.Queue()
        socket.listen(inbox.put_nowait)
        tokenizer: asyncio.Task[loader.Tokenizer] | None = None
        try:
            while True:
                async with asyncio.timeout(timeout_s):
                    message = decode_from_engine(await inbox.get())
                match message:
                    case Found(folder):
                        # It takes a while, and stop strings need it: off the loop, beside the load.
                        reading = asyncio.to_thread(loader.Tokenizer, Path(folder))
                        tokenizer = asyncio.create_task(reading)
                    case Ready(info) if tokenizer is not None:
                        return cls(socket, info, await tokenizer, first_request=first_request)
                    case Failed(kind, text):
                        raise error_of(kind, text)
                    case LoadProgress():
                        if on_progress is not None:
                            on_progress(message)
                    case Begun():
                        pass
                    case _:
                        raise EngineError(f"the engine sent {type(message).__name__} unready")
        except BaseException as error:
            socket.close()
            if tokenizer is not None:
                tokenizer.cancel()
            if isinstance(error, TimeoutError):
                raise EngineDead(f"the engine said nothing for {timeout_s} s") from None
            raise

    @property
    def alive(self) -> bool:
        """Whether the engine is not known to be dead."""
        return self._dead is None

    @property
    def cause(self) -> str | None:
        """Why the engine is dead; None while it is not known to be."""
        return None if self._dead is None else str(self._dead)

    def generate(
        self,
        prompt: Sequence[int] | npt.NDArray[np.integer[Any]],
        params: SamplingParams,
        *,
        salt: int = 0,
        priority: int = 0,
        tenant: str | None = None,
    ) -> TokenStream:
        """Run a request.

        Args:
            prompt: token ids [T].
            params: how to sample.
            salt: prompts share cached KV only with prompts of the same 64-bit salt.
            priority: lower goes first.
            tenant: whose request it is. Within a priority tenants get even shares of the tokens,
                and the requests of each go in order of arrival. None goes by the salt.

        Raises:
            RequestError: the request is wrong. The stream raises Overloaded where the engine would
                let it wait too long.
            EngineDead: the engine is gone.
        """
        self._check_alive()
        ids = checked_prompt(prompt, self.info)
        max_new_tokens = checked_max_new_tokens(len(ids), params, self.info)
        stops = None
        if params.stop:
            stops = StopStrings(params.stop, self.tokenizer.incremental_detokenizer())
        request = next(self._numbers)
        stream = TokenStream(
            request=request,
            prompt_tokens=len(ids),
            stop_strings=stops,
            abort=lambda: self._abort(request),
        )
        self._streams.add(request, stream)
        self._send(
            Submit(
                request,
                ids.tobytes(),
                params,
                max_new_tokens,
                params.seed,
                salt,
                priority,
                None if tenant is None else _tenant_number(tenant),
                sent_us=time.monotonic_ns() // 1000,
            )
        )
        return stream

    async def stats(self) -> EngineStats:
        """The engine's counters, answered between two steps."""
        value = await self._call("stats")
        assert isinstance(value, EngineStats)
        return value

    async def live_requests(self) -> list[LiveRequest]:
        """The requests that have not ended, and where their time goes."""
        value = await self._call("live_requests")
        assert isinstance(value, list)
        return live_requests(value)

    async def flush_cache(self, timeout_s: float = 0.0) -> bool:
        """Drop the prefix cache; False if requests still ran after `timeout_s`."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not await self._call("flush_cache"):
            if asyncio.get_running_loop().time() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def start_profile(self, output_dir: str | None, steps: int | None) -> str:
        """Record the following forward passes; the path the trace will have."""
        value = await self._call("start_profile", output_dir=output_dir, steps=steps)
        assert isinstance(value, str)
        return value

    async def stop_profile(self) -> str:
        """End the recording and write the trace; its path."""
        value = await self._call("stop_profile")
        assert isinstance(value, str)
        return value

    async def subscribe_cache(self) -> AsyncIterator[CacheEventBatch]:
        """Changes of the prefix cache, beginning with everything it holds.

        Raises:
            EngineDead: the engine is gone, now or later.
        """
        queue: asyncio.Queue[CacheEventBatch | None] = asyncio.Queue()
        self._check_alive()
        # The snapshot of a new subscriber would repeat pages to the others: each batch that
        # begins one starts with "cleared", so to repeat it is harmless.
        self._cache_queues.append(queue)
        try:
            await self._call("subscribe_cache", on=True)
            while (batch := await queue.get()) is not None:
                yield batch
            self._check_alive()
        finally:
            self._cache_queues.remove(queue)
            if not self._cache_queues and self.alive:
                await self._call("subscribe_cache", on=False)

    def shut_down(self) -> None:
        """Ask the engine process to end."""
        if self.alive:
            self._send(Shutdown())

    def fail(self, reason: str) -> None:
        """The engine is gone: end every open stream and call with `EngineDead`."""
        if self._dead is not None:
            return
        self._dead = EngineDead(reason)
        self._streams.fail_all(self._dead)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(self._dead)
        self._calls.clear()
        for queue in self._cache_queues:
            queue.put_nowait(None)

    def close(self) -> None:
        """Close the socket; the engine process is not ended."""
        self.fail("the client was closed")
        self._socket.close()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(str(self._dead))

    def _send(self, message: ToEngine) -> None:
        self._socket.send(encode(message))

    def _abort(self, request: int) -> None:
        if request in self._streams and self.alive:
            self._send(Abort(request))

    async def _call(
        self, method: str, **arguments: Any
    ) -> EngineStats | bool | str | list[list[int]] | None:
        self._check_alive()
        number = next(self._numbers)
        future: asyncio.Future[EngineStats | bool | str | list[list[int]] | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._calls[number] = future
        self._send(Call(number, method, arguments))
        try:
            return await future
        finally:
            self._calls.pop(number, None)

    def _receive(self, data: bytes) -> None:
        self.messages += 1
        try:
            self._take(decode_from_engine(data))
        except (msgspec.MsgspecError, EngineError) as error:
            # An engine that speaks nonsense serves nobody; no stream may wait for it.
            self.fail(f"the engine sent what it should not: {error}")

    def _take(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                self._streams.take(message)
            case Reply(number, value, error_kind, error_message):
                call = self._calls.get(number)
                if call is not None and not call.done():
                    if error_kind is None:
                        call.set_result(value)
                    else:
                        call.set_exception(error_of(error_kind, error_message or ""))
            case CacheEventBatch():
                for queue in self._cache_queues:
                    queue.put_nowait(message)
            case Refused(request, kind, text):
                self._streams.fail(request, error_of(kind, text))
            case Failed(kind, text):
                self.fail(f"the engine stopped: {kind}: {text}")
            case Begun() | Found() | LoadProgress() | Ready():
                raise EngineError(f"the engine sent {type(message).__name__} twice")


def _tenant_number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
