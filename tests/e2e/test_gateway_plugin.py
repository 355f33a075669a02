"""Requests that the gateway would refuse reach the engine by its plugin, and no others change."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from tests.support.scripted_gateway import SpeakingEngine, behind_gateway
from tokenspeed.entrypoint.parsers import Parsers
from tokenspeed.loader import ModelFiles

ROOT = Path(__file__).parents[2]
PATH = "/v1/responses"
CONTEXT = 1 << 22
# All of it is text to a plugin that looks for names.
TRICKY = 'quotes \\" and "client_metadata": {"a": [1, "]}"]}, \\\\'


def user(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


async def asked(
    client: httpx.AsyncClient, engine: SpeakingEngine, text: str
) -> tuple[int, str, str]:
    """The status of a request in the words given, what the engine saw of it, and the answer."""
    engine.asked.clear()
    headers = {"content-type": "application/json"}
    answer = await client.post(PATH, content=text, headers=headers)
    return answer.status_code, "".join(engine.asked), answer.text


@pytest.fixture
def engine(qwen_coder: ModelFiles) -> SpeakingEngine:
    engine = SpeakingEngine(qwen_coder.tokenizer_dir, model_name="m")
    engine.info = replace(engine.info, context_max=CONTEXT)
    engine.text = "On it."
    return engine


PARSERS = Parsers(tool_call="qwen", reasoning="passthrough")


def test_what_agents_send_is_left_out_or_mended_and_the_rest_stays(engine: SpeakingEngine) -> None:
    reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": TRICKY}]}
    items: list[dict[str, Any]] = [
        user(TRICKY),
        reasoning | {"content": None, "encrypted_content": None},
        reasoning | {"id": None},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "x"}},
        user("Go on."),
    ]
    metadata = {"x": TRICKY, "y": ["]", {"z": "}"}]}
    wanted = {"model": "m", "input": [items[0], items[4]], "store": False}
    variants = {
        "the field first": {"client_metadata": metadata} | wanted,
        "the field last": wanted | {"client_metadata": metadata},
        "alone": wanted,
        "items": wanted | {"input": items},
        "an item first": wanted | {"input": items[3:] + items[:1]},
    }

    async def run() -> dict[str, tuple[int, str, str]]:
        async with behind_gateway(engine, PARSERS) as client:
            found = {}
            for name, body in variants.items():
                found[name] = await asked(client, engine, json.dumps(body, indent=2))
                packed = await asked(client, engine, json.dumps(body, separators=(",", ":")))
                assert packed[:2] == found[name][:2]
            return found

    found = asyncio.run(run())
    assert {name: status for name, (status, *_) in found.items()} == dict.fromkeys(variants, 200)
    plain = found["alone"][1]
    assert TRICKY in plain and "Go on." in plain
    assert found["the field first"][1] == found["the field last"][1] == plain
    assert TRICKY in found["items"][1] and "Go on." in found["items"][1]


WRONG = {
    "unknown field": '{"model": "m", "input": "hi", "client_metadata": {}, "max_token": 3}',
    "cut": '{"model": "m", "input": "hi", "client_metadata": {}',
    "comma": '{"model": "m", "input": "hi", "client_metadata": {},}',
    "no comma": '{"model": "m", "input": "hi" "client_metadata": {}}',
    "comma in items": '{"model": "m", "input": [{"type": "web_search_call"}, ]}',
    "more": '{"model": "m", "input": "hi", "client_metadata": {}} and more',
    "open string": '{"model": "m", "input": "hi", "client_metadata": "',
    "list": '["client_metadata"]',
    "empty": "",
}


def test_what_is_wrong_is_refused_as_ever(engine: SpeakingEngine) -> None:
    async def run() -> dict[str, tuple[int, str, str]]:
        async with behind_gateway(engine, PARSERS) as client:
            return {name: await asked(client, engine, text) for name, text in WRONG.items()}

    found = asyncio.run(run())
    assert {name: answer[:2] for name, answer in found.items()} == dict.fromkeys(WRONG, (400, ""))
    assert "max_token" in found["unknown field"][2]


def test_long_requests_pass_through_it(engine: SpeakingEngine) -> None:
    long = "word " * 200_000

    async def run() -> list[tuple[int, str, str]]:
        async with behind_gateway(engine, PARSERS) as client:
            bodies = [
                {"model": "m", "input": [user(long)], **more}
                for more in ({}, {"client_metadata": {}})
            ]
            return [await asked(client, engine, json.dumps(body)) for body in bodies]

    plain, rewritten = asyncio.run(run())
    assert plain[0] == rewritten[0] == 200, plain[2] + rewritten[2]
    assert long in plain[1] and plain[1] == rewritten[1]


def test_only_who_has_the_key_may_add_plugins(engine: SpeakingEngine) -> None:
    async def run() -> list[int]:
        async with behind_gateway(engine, PARSERS, api_key="key") as client:
            answers = [
                await client.request(method, "/wasm", headers={"authorization": key}, json={})
                for method in ("GET", "POST")
                for key in ("", "Bearer other")
            ]
            body = {"model": "m", "input": "hi", "client_metadata": {}}
            status, _, said = await asked(client, engine, json.dumps(body))
            assert status == 200, said
            return [answer.status_code for answer in answers]

    assert asyncio.run(run()) == [401] * 4


def test_the_plugin_is_that_of_its_sources() -> None:
    sources = [ROOT / "csrc" / "gateway" / name for name in ("requests.c", "component.wat")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    plugin = ROOT / "src" / "tokenspeed" / "entrypoint" / "gateway_requests.wasm"
    assert plugin.read_bytes().endswith(b"sources" + digest.encode()), "run `make gateway-plugin`"
