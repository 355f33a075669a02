"""Wrong requests get a clear error, and the engine goes on."""

from typing import Any

import pytest

from .serving import Serve

CHAT = "/v1/chat/completions"
UNENFORCEABLE = {
    "type": "json_schema",
    "json_schema": {"name": "set", "schema": {"type": "array", "uniqueItems": True}},
}


def body(**fields: Any) -> dict[str, Any]:
    question = [{"role": "user", "content": "Name the capital of France."}]
    return {"model": "smollm2-135m", "messages": question, "max_tokens": 4} | fields


@pytest.fixture(autouse=True)
def serves_afterwards(server: Serve) -> Any:
    yield
    status, answer = server.post(CHAT, body(temperature=0))
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"model": "no-such-model"}, 404, "no-such-model"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -0.5}, 400, "temperature"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"presence_penalty": 9}, 400, "presence_penalty"),
        ({"top_logprobs": 99, "logprobs": True}, 400, "top_logprobs"),
        ({"n": 1000}, 400, "n"),
        ({"response_format": UNENFORCEABLE}, 400, "uniqueItems"),
        ({"response_format": UNENFORCEABLE, "stream": True}, 400, "uniqueItems"),
        ({"regex": "(?!a)b"}, 400, "regex"),
        ({"ebnf": "root ::= missing"}, 400, "missing"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "1024 tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_wrong_field_is_named(
    server: Serve, fields: dict[str, Any], status: int, named: str
) -> None:
    found, answer = server.post(CHAT, body(**fields))
    assert found == status, answer
    assert named in answer["error"]["message"]


@pytest.mark.parametrize(
    "data", [b'{"model": ', b'{"model": "smollm2-135m", "temperature": NaN}', b"", b"[]", b"\xff"]
)
def test_malformed_json_is_refused(server: Serve, data: bytes) -> None:
    status, answer = server.post(CHAT, data)
    assert status == 400
    assert answer["error"]["message"]


def test_a_huge_max_tokens_is_cut_to_the_context(server: Serve) -> None:
    status, answer = server.post(CHAT, body(max_tokens=100_000, temperature=0))
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "stop")
