"""Random HTTP requests to the gateway: `python -m tests.fuzz.gateway --requests 2000`.

schemathesis makes them from a description of the endpoints, half as it says and half against it.
No answer is a 500 or worse, none fails to come, and the server is as it was.
"""

import argparse
import collections
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from tests.e2e.serving import Serve
from tests.fuzz.servicer import GROWTH_MAX_BYTES, memory

__all__ = ["Report", "description", "fuzz"]

ANSWER_TIMEOUT_S = 300
TOKENS_MAX = 8
MODEL = "smollm2-135m"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of a run.

    Attributes:
        statuses: how often each status came, by path.
        memory: bytes by process, at the start and after each third of the requests.
    """

    statuses: dict[str, int]
    memory: list[dict[str, int]]


def description() -> dict[str, Any]:
    """The endpoints in OpenAPI, as far as agents use them; answers are kept short."""
    # Empty texts, 8.0 in place of 8 and unknown fields are refused, each by some endpoint; the
    # cases that break the description have them.
    text = {"type": "string", "minLength": 1, "maxLength": 200}
    number = {"type": "number", "minimum": 0, "maximum": 2}
    tokens = {"enum": [*range(1, TOKENS_MAX + 1)]}
    part = _record({"type": {"enum": ["text"]}, "text": text}, "type", "text")
    content = {"anyOf": [text, {"type": "array", "items": part, "minItems": 1, "maxItems": 3}]}
    schema = {"type": "object"}
    function = _record(
        {"name": {"type": "string", "pattern": "^[a-z_]{1,20}$"}, "parameters": schema}, "name"
    )
    shared = {
        "model": {"enum": [MODEL]},
        "temperature": number,
        "top_p": {"type": "number", "minimum": 0.01, "maximum": 1},
        "stream": {"type": "boolean"},
    }
    chat_message = _record(
        {"role": {"enum": ["system", "user", "assistant"]}, "content": content}, "role", "content"
    )
    chat = _record(
        shared
        | {
            "messages": {"type": "array", "items": chat_message, "minItems": 1, "maxItems": 4},
            "max_tokens": tokens,
            "n": {"enum": [1, 2, 3, 4]},
            "seed": {"enum": [0, 7, 2**62]},
            "stop": {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
            "logprobs": {"type": "boolean"},
            "presence_penalty": number,
            "frequency_penalty": number,
            "tools": {
                "type": "array",
                "items": _record(
                    {"type": {"enum": ["function"]}, "function": function}, "type", "function"
                ),
                "maxItems": 3,
            },
            "tool_choice": {"enum": ["auto", "none"]},
            "response_format": _record({"type": {"enum": ["text", "json_object"]}}, "type"),
        },
        "model",
        "messages",
        "max_tokens",
    )
    claude_message = _record(
        {"role": {"enum": ["user", "assistant"]}, "content": content}, "role", "content"
    )
    claude = {
        "model": shared["model"],
        "messages": {"type": "array", "items": claude_message, "minItems": 1, "maxItems": 4},
        "system": content,
        "tools": {
            "type": "array",
            "items": _record(
                {"name": function["properties"]["name"], "input_schema": schema},
                "name",
                "input_schema",
            ),
            "maxItems": 3,
        },
    }
    bodies = {
        "/v1/chat/completions": chat,
        "/v1/completions": _record(
            shared | {"prompt": text, "max_tokens": tokens}, "model", "prompt", "max_tokens"
        ),
        "/v1/messages": _record(
            shared | claude | {"max_tokens": tokens}, "model", "messages", "max_tokens"
        ),
        "/v1/messages/count_tokens": _record(claude, "model", "messages"),
        "/v1/responses": _record(
            shared
            | {
                "input": text,
                "instructions": text,
                "max_output_tokens": tokens,
                "store": {"type": "boolean"},
            },
            "model",
            "input",
            "max_output_tokens",
        ),
        "/v1/tokenize": _record({"model": shared["model"], "prompt": text}, "model", "prompt"),
        "/v1/detokenize": _record(
            {
                "model": shared["model"],
                "tokens": {
                    "type": "array",
                    "items": {"enum": [0, 1, 9, 49151, 49152]},
                    "maxItems": 20,
                },
            },
            "model",
            "tokens",
        ),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "gateway", "version": "1"},
        "paths": {
            path: {
                "post": {
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": body}},
                    },
                    "responses": {"200": {"description": "answered"}},
                }
            }
            for path, body in bodies.items()
        },
    }


def fuzz(server: Serve, *, requests: int, first_seed: int) -> Report:
    """Send requests, as many to each path.

    Raises:
        AssertionError: a status of 500 or more, or the engine is not as it was.
    """
    statuses: collections.Counter[str] = collections.Counter()
    engine = server.engine()
    described = schemathesis.openapi.from_dict(description())
    paths = list(description()["paths"])
    with server.servicer() as channel:
        sizes = [memory(server, server.wait_until_idle(channel))]
        for third in range(3):
            for path in paths:
                operation = described[path]["POST"]
                cases = st.one_of(
                    operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
                    operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
                )
                count = -(-requests // (3 * len(paths)))
                for status in send(server, cases, count=count, first_seed=first_seed + third):
                    statuses[f"{path} {status}"] += 1
            counters = server.wait_until_idle(channel)
            sizes.append(memory(server, counters))
    assert server.engine() == engine, "the engine died"
    assert counters["pages_active"] == 0
    assert counters["pages_free"] + counters["pages_cached"] == counters["pages_total"]
    report = Report(statuses=dict(sorted(statuses.items())), memory=sizes)
    # The gateway keeps the answers of the Responses API, as its users ask it to.
    for process in ("engine", "servicer"):
        growth = sizes[-1][process] - sizes[1][process]
        assert growth < GROWTH_MAX_BYTES, f"{process} grew by {growth >> 20} MiB: {report}"
    return report


def send(server: Serve, cases: Any, *, count: int, first_seed: int) -> list[int]:
    """Send so many of the cases; their statuses."""
    statuses = []

    @seed(first_seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def once(case: Any) -> None:
        answer = case.call(base_url=server.url, timeout=ANSWER_TIMEOUT_S)
        statuses.append(answer.status_code)
        # 501 is what the gateway says of what it does not offer.
        assert answer.status_code in (*range(200, 500), 501), (answer.text[:500], case.body)

    once()
    return statuses


def _record(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def main() -> None:
    """Fuzz a server of its own, and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.gateway", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Serve(Path(folder) / "log") as server:
        report = fuzz(server, requests=arguments.requests, first_seed=arguments.seed)
    print(f"{sum(report.statuses.values())} requests from seed {arguments.seed}")
    for name, count in report.statuses.items():
        print(f"  {name}: {count}")
    for process in report.memory[-1]:
        sizes = ", ".join(f"{third.get(process, 0) >> 20}" for third in report.memory)
        print(f"  MiB of {process} at the start and after each third: {sizes}")


if __name__ == "__main__":
    main()
