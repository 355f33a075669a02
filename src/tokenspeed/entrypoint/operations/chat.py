"""The dashboard's chat box: its words go to the gateway, whose answer streams back."""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import httpx
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

__all__ = ["ChatProxy"]

_MESSAGES_MAX = 200
_TOKENS_MAX = 4096
_CONNECT_TIMEOUT_S = 5.0
_ERROR_SIZE_MAX_BYTES = 4096


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


class _Chat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1, max_length=_MESSAGES_MAX)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=_TOKENS_MAX)] = 512
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None


_decoder = msgspec.json.Decoder(_Chat)


class ChatProxy:
    """Takes a conversation of the dashboard to the gateway, as one of the tenant "dashboard".

    Args:
        api_key: the gateway's; None where it wants none.

    Attributes:
        gateway_url: where it listens; None before it does.
        model: the served model's name.
        temperature: of conversations that bring none; None for the model's own.
    """

    def __init__(self, api_key: str | None) -> None:
        self.gateway_url: str | None = None
        self.model: str | None = None
        self.temperature: float | None = None
        self._api_key = api_key

    async def chat(self, request: Request) -> Response:
        """The gateway's stream of server-sent events, as it comes."""
        if self.gateway_url is None:
            raise HTTPException(503, "the gateway has not started yet")
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            raise HTTPException(415, "send a body of application/json")
        try:
            chat = _decoder.decode(await request.body())
        except msgspec.MsgspecError as error:
            raise HTTPException(400, str(error)) from None
        headers = {"x-request-id": f"tenant=dashboard/start={time.time_ns() // 1_000_000}"}
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        body = {**msgspec.to_builtins(chat), "model": self.model, "stream": True}
        if chat.temperature is None:
            del body["temperature"]
            if self.temperature is not None:
                body["temperature"] = self.temperature
        # A proxy of the environment has no way to this machine's loopback.
        client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S), trust_env=False
        )
        try:
            answer = await client.send(
                client.build_request(
                    "POST", f"{self.gateway_url}/v1/chat/completions", json=body, headers=headers
                ),
                stream=True,
            )
        except httpx.HTTPError as error:
            await client.aclose()
            raise HTTPException(502, f"the gateway does not answer: {error}") from None
        if answer.status_code != 200:
            return await _refusal(client, answer)
        return StreamingResponse(_relayed(client, answer), media_type="text/event-stream")


async def _relayed(client: httpx.AsyncClient, answer: httpx.Response) -> AsyncIterator[bytes]:
    """The answer's bytes. Ends the request when whoever reads goes away."""
    try:
        async for data in answer.aiter_raw():
            yield data
    except httpx.HTTPError:
        # The page sees a stream without its last event, as any client of the gateway would.
        return
    finally:
        await answer.aclose()
        await client.aclose()


async def _refusal(client: httpx.AsyncClient, answer: httpx.Response) -> Response:
    text = b""
    try:
        async for data in answer.aiter_bytes():
            text += data
            if len(text) > _ERROR_SIZE_MAX_BYTES:
                break
    finally:
        await answer.aclose()
        await client.aclose()
    headers = {
        name: value for name in ("retry-after",) if (value := answer.headers.get(name)) is not None
    }
    message = text[:_ERROR_SIZE_MAX_BYTES].decode(errors="replace")
    raise HTTPException(answer.status_code, f"the gateway says: {message}", headers=headers)
