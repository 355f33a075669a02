"""One streamed chat answer over HTTP, timed as the bytes arrive.

httpx and a reader of server-sent events of our own, not the `openai` client: that one builds
validated objects of every chunk before anybody can look at a clock, and its CPU time would be taken
from a server on the same machine (docs/bench.md has the figures).
"""

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx

from tokenspeed.core.errors import MeasurementError

__all__ = ["Answer", "ChatClient"]

_CONNECT_TIMEOUT_S = 10.0
# What an answer's delta may carry that a user sees.
_VISIBLE = ("content", "reasoning_content", "reasoning", "refusal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back; times in seconds of the client's clock.

    Attributes:
        sent_s: just before the request was sent.
        piece_s: when each piece of text arrived. Pieces of one network read have one time.
        ended_s: when the stream ended or failed.
        text: of the answer, without its reasoning.
        prompt_tokens, output_tokens, cached_tokens: as the server counted them; None where it did
            not.
        error: what went wrong, None if nothing did.
        unreachable: whether the connection failed, and not the request.
    """

    sent_s: float
    piece_s: tuple[float, ...]
    ended_s: float
    text: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    error: str | None = None
    unreachable: bool = False


class ChatClient:
    """Asks one server's `/v1/chat/completions`.

    Args:
        url: of the server, with or without `/v1`.
        model: the name to ask for; None for the first that the server lists.
        forces_lengths: whether to send `ignore_eos` and `min_tokens`, so that an answer has exactly
            the tokens asked for; servers that know neither ignore or refuse them.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        forces_lengths: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.forces_lengths = forces_lengths
        self._model = model
        self._clock = clock
        headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers=headers,
                timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
                # As many users as there are; the system's proxies are not between us and a server.
                # Each request has a connection of its own: llama-server closes one that was used,
                # at times just as the next request is written to it.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
                trust_env=False,
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise MeasurementError(f"{url!r} is no URL of a server: {error}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    @property
    def model(self) -> str:
        """The name that is asked for; `find_model` has looked it up."""
        assert self._model is not None
        return self._model

    async def find_model(self) -> str:
        """Check that the server is there and knows the model.

        Raises:
            MeasurementError: it is not, or it lists no model.
        """
        try:
            reply = await self._http.get("/v1/models", timeout=_CONNECT_TIMEOUT_S)
            reply.raise_for_status()
            names = [str(entry["id"]) for entry in reply.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise MeasurementError(
                f"no server answers at {self.url}/v1/models: {_say(error)}"
            ) from error
        if self._model is None:
            if not names:
                raise MeasurementError(f"{self.url} lists no model; name one with --model")
            self._model = names[0]
        return self._model

    async def is_reachable(self) -> bool:
        """Whether anything answers at the URL, be it an error."""
        try:
            await self._http.get("/v1/models", timeout=_CONNECT_TIMEOUT_S)
        except httpx.TimeoutException:
            # Alive enough to take the connection: a server may be busy for that long.
            return True
        except httpx.HTTPError:
            return False
        return True

    async def answer(self, messages: Sequence[dict[str, str]], *, output_tokens: int) -> Answer:
        """Have one answer streamed. What fails is told in the answer, and raises nothing."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.forces_lengths:
            body |= {"ignore_eos": True, "min_tokens": output_tokens}
        content = json.dumps(body).encode()
        request = self._http.build_request(
            "POST",
            "/v1/chat/completions",
            content=content,
            headers={"Content-Type": "application/json", "Accept": "text/event-stream"},
        )
        stream = _Stream()
        sent_s = self._clock()
        error, unreachable = None, False
        try:
            response = await self._http.send(request, stream=True)
            try:
                if response.status_code != httpx.codes.OK:
                    error = f"HTTP {response.status_code}: {_body(await response.aread())}"
                else:
                    await self._read(response.aiter_raw(), stream)
                    error = stream.error
                    if error is None and not stream.is_over:
                        error, unreachable = "the stream ended without [DONE]", True
            finally:
                await response.aclose()
        except httpx.HTTPError as failure:
            error, unreachable = _say(failure), not isinstance(failure, httpx.ReadTimeout)
        return Answer(
            sent_s=sent_s,
            piece_s=tuple(stream.piece_s),
            ended_s=self._clock(),
            text="".join(stream.text),
            prompt_tokens=stream.count("prompt_tokens"),
            output_tokens=stream.count("completion_tokens"),
            cached_tokens=stream.cached_tokens(),
            error=error,
            unreachable=unreachable,
        )

    async def _read(self, chunks: AsyncIterator[bytes], stream: "_Stream") -> None:
        rest = b""
        async for chunk in chunks:
            now_s = self._clock()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                stream.take(line, now_s)


class _Stream:
    """What the events of one answer have said so far."""

    def __init__(self) -> None:
        self.piece_s: list[float] = []
        self.text: list[str] = []
        self.error: str | None = None
        self.is_over = False
        self._usage: dict[str, Any] = {}

    def take(self, line: bytes, now_s: float) -> None:
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self.is_over = True
            return
        try:
            event = json.loads(data)
        except ValueError:
            self.error = f"an event is no JSON: {_body(data)}"
            return
        if not isinstance(event, dict) or event.get("error"):
            self.error = f"the stream told of an error: {_body(data)}"
            return
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if any(delta.get(field) for field in _VISIBLE) or delta.get("tool_calls"):
                self.piece_s.append(now_s)
                self.text.append(delta.get("content") or "")

    def count(self, name: str) -> int | None:
        value = self._usage.get(name)
        return value if isinstance(value, int) else None

    def cached_tokens(self) -> int | None:
        details = self._usage.get("prompt_tokens_details") or {}
        value = details.get("cached_tokens")
        return value if isinstance(value, int) else None


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _body(data: bytes) -> str:
    return data[:300].decode(errors="replace").strip()
