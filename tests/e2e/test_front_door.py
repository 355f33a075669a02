"""What the gateway and the servicer do about silence, size, speed and strangers."""

import asyncio
import contextlib
import http.client
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.support.scripted_gateway import SpeakingEngine, behind_gateway
from tokenspeed.core.step import FinishReason
from tokenspeed.entrypoint import gateway
from tokenspeed.entrypoint.parsers import PASSTHROUGH, Parsers
from tokenspeed.loader import ModelFiles

from .serving import Serve

PLAIN = Parsers(tool_call=PASSTHROUGH, reasoning=PASSTHROUGH)
MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
STREAMS = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    "/v1/responses": {"input": "hello"},
    "/v1/completions": {"prompt": "hello"},
}


def asked(engine: SpeakingEngine, case: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with behind_gateway(engine, PLAIN) as client:
            return await case(client)

    return asyncio.run(run())


@pytest.mark.slow
def test_a_client_that_reads_for_five_seconds_at_most_outlives_a_long_prefill(
    smollm2: ModelFiles,
) -> None:
    engine = SpeakingEngine(smollm2.tokenizer_dir, model_name="m")
    engine.text, engine.delay_s = "Here I am.", 11.0

    async def case(client: httpx.AsyncClient) -> list[str]:
        async def read(path: str, body: dict[str, Any]) -> str:
            async with client.stream(
                "POST", path, json=body | {"model": "m", "stream": True}, timeout=5.0
            ) as answer:
                assert answer.status_code == 200
                return (await answer.aread()).decode()

        return await asyncio.gather(*(read(path, body) for path, body in STREAMS.items()))

    for path, text in zip(STREAMS, asked(engine, case), strict=True):
        assert "Here" in text, path
        assert text.count("ping") >= 2, path


def test_bodies_and_headers_without_end_are_refused_and_the_next_request_is_served(
    smollm2: ModelFiles,
) -> None:
    engine = SpeakingEngine(smollm2.tokenizer_dir, model_name="m")
    engine.text = "Yes."

    def status(port: int, body: bytes, headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.putrequest("POST", "/v1/chat/completions")
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.putheader("content-type", "application/json")
            connection.putheader("content-length", str(len(body)))
            connection.endheaders()
            # The refusal may come before the body is through.
            with contextlib.suppress(ConnectionError):
                connection.send(body)
            return connection.getresponse().status
        except (ConnectionError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    async def case(client: httpx.AsyncClient) -> list[int]:
        port = client.base_url.port
        assert port is not None
        good = json.dumps({"model": "m", "messages": MESSAGES}).encode()
        large = b" " * (40 << 20)
        ask = asyncio.to_thread
        return [
            await ask(status, port, large, {}),
            await ask(status, port, good, {f"x-{n}": "a" for n in range(1000)}),
            await ask(status, port, good, {"x-large": "a" * (2 << 20)}),
            await ask(status, port, good, {}),
        ]

    large, many, long, good = asked(engine, case)
    # The gateway may close the connection before its refusal is read.
    assert large in (0, 413)
    assert many in (0, 431)
    assert long in (0, 431)
    assert good == 200
    assert len(engine.streams) == 1


def test_a_draining_servicer_ends_what_runs_and_takes_nothing_new(smollm2: ModelFiles) -> None:
    engine = SpeakingEngine(smollm2.tokenizer_dir, model_name="m")
    engine.text, engine.delay_s = "Until the end.", 1.0

    async def run() -> tuple[str, int, str]:
        async with behind_gateway(engine, PLAIN) as client:
            body = {"model": "m", "messages": MESSAGES}
            running = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await engine.wait_for_requests(1)
            engine.servicer.draining = True
            refused = await client.post("/v1/chat/completions", json=body)
            finished = await running
            text: str = finished.json()["choices"][0]["message"]["content"]
            return text, refused.status_code, refused.text

    text, status, refusal = asyncio.run(run())
    assert text == "Until the end."
    assert status == 429
    assert "draining" in refusal


def test_tenants_share_no_cache_and_the_credential_stays_in_the_gateway(
    smollm2: ModelFiles,
) -> None:
    engine = SpeakingEngine(smollm2.tokenizer_dir, model_name="m")
    engine.text = "Yes."

    async def run() -> list[int]:
        statuses = []
        async with behind_gateway(engine, PLAIN, api_key="secret") as client:
            for name in ("tenant=ann", "tenant=ann/2", "tenant=bob", "other"):
                answer = await client.post(
                    "/v1/chat/completions",
                    json={"model": "m", "messages": MESSAGES},
                    headers={"x-request-id": name},
                )
                statuses.append(answer.status_code)
            for key in ("", "Bearer wrong"):
                answer = await client.post(
                    "/v1/chat/completions",
                    json={"model": "m", "messages": MESSAGES},
                    headers={"authorization": key},
                )
                statuses.append(answer.status_code)
        return statuses

    assert asyncio.run(run()) == [200] * 4 + [401] * 2
    assert engine.tenants == ["ann", "ann", "bob", None]
    ann, again, bob, other = engine.salts
    assert ann == again
    assert len({ann, bob, other}) == 3
    assert other == 0


def test_requests_beyond_the_most_at_once_hear_when_to_come_back(
    smollm2: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gateway.REQUESTS_MAX == 1024
    # A thousand open requests would need more files than some machines allow.
    monkeypatch.setattr(gateway, "REQUESTS_MAX", 3)
    engine = SpeakingEngine(smollm2.tokenizer_dir, model_name="m")
    engine.text, engine.delay_s = "Yes.", 3600.0

    async def case(client: httpx.AsyncClient) -> httpx.Response:
        body = {"model": "m", "messages": MESSAGES}
        running = [asyncio.create_task(client.post(CHAT, json=body)) for _ in range(3)]
        await engine.wait_for_requests(3)
        try:
            return await client.post(CHAT, json=body)
        finally:
            for stream in engine.streams:
                stream.push_end(FinishReason.ABORT)
            assert [answer.status_code for answer in await asyncio.gather(*running)] == [200] * 3
            for task in engine.speaking:
                task.cancel()

    refused = asked(engine, case)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert len(engine.streams) == 3


def test_what_one_tenant_sent_is_cached_for_that_tenant_alone(server: Serve) -> None:
    def cached(name: str) -> int:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={
                "model": "smollm2-135m",
                "messages": [{"role": "user", "content": "Which door is the front door? " * 20}],
                "max_tokens": 1,
            },
            headers={"x-request-id": name} if name else {},
            timeout=500,
            trust_env=False,
        )
        details: dict[str, int] | None = answer.json()["usage"].get("prompt_tokens_details")
        return details["cached_tokens"] if details else 0

    names = ("tenant=ann/1", "tenant=bob/1", "tenant=ann/2", "tenant=bob/2", "", "")
    first, stranger, again, again_stranger, nobody, again_nobody = map(cached, names)
    assert (first, stranger, nobody) == (0, 0, 0)
    assert again == again_stranger == again_nobody >= 96
