"""What agents need of a real model behind the gateway: tools, reasoning, history, counts."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tokenspeed.loader import ModelFiles

from .serving import Serve

MODEL = "qwen2.5-coder-0.5b"
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}},
                "required": ["path"],
            },
        },
    }
    for name, description in (("read_file", "Reads a file."), ("list_folder", "Lists a folder."))
]
CLAUDE_TOOLS: list[Any] = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"]["description"],
        "input_schema": tool["function"]["parameters"],
    }
    for tool in TOOLS
]
QUESTION: list[Any] = [{"role": "user", "content": "Read a.py, then list src."}]
# A model this small does not keep to a form by itself; which words it puts into it is its choice.
CALL = r'<tool_call>\n\{"name": "%s", "arguments": \{"path": "[a-z./]{1,12}"\}\}\n</tool_call>'
ONE_CALL = CALL % "read_file"
TWO_CALLS = f"On it\\.\\n{CALL % 'read_file'}\\n{CALL % 'list_folder'}"
THOUGHT = r"<think>[a-z ]{8,40}</think>[A-Z][a-z ]{4,30}\."


@pytest.fixture(scope="module")
def coder(qwen_coder: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    log = tmp_path_factory.mktemp("coder") / "log"
    # Its own template has no thoughts; the parser is given, as for a model that was taught them.
    with Serve(log, "--reasoning-parser", "qwen3", model=MODEL) as running:
        yield running


@pytest.fixture(scope="module")
def client(coder: Serve) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{coder.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(coder: Serve) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=coder.url, api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **options: Any) -> Any:
    options = {"messages": QUESTION, "max_tokens": 120, "temperature": 0.7, "seed": 3} | options
    return client.chat.completions.create(model=MODEL, **options)


def gathered(chunks: Any) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls that a stream adds up to."""
    text = ""
    calls: list[tuple[str, str]] = []
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.index == len(calls):
                    calls.append(("", ""))
                name, arguments = calls[call.index]
                calls[call.index] = (
                    name + (call.function.name or ""),
                    arguments + (call.function.arguments or ""),
                )
    return text, calls


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [ONE_CALL, TWO_CALLS], ids=["single", "parallel"])
def test_calls_whole_and_streamed_are_the_same(client: openai.OpenAI, pattern: str) -> None:
    extra = {"regex": pattern}
    whole = chat(client, tools=TOOLS, extra_body=extra).choices[0]
    assert whole.finish_reason == "tool_calls"
    calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert [name for name, _ in calls] == ["read_file", "list_folder"][: len(calls)]
    assert len(calls) == 1 + (pattern is TWO_CALLS)
    assert len({call.id for call in whole.message.tool_calls}) == len(calls)
    for _, arguments in calls:
        assert list(json.loads(arguments)) == ["path"]
    text, streamed = gathered(chat(client, tools=TOOLS, extra_body=extra, stream=True))
    assert [(name, json.loads(arguments)) for name, arguments in streamed] == [
        (name, json.loads(arguments)) for name, arguments in calls
    ]
    assert text.strip() == (whole.message.content or "").strip()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_split_from_the_answer(client: openai.OpenAI, stream: bool) -> None:
    answer: Any = chat(client, extra_body={"regex": THOUGHT}, stream=stream)
    if stream:
        deltas = [choice.delta for chunk in answer for choice in chunk.choices]
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        text = "".join(delta.content or "" for delta in deltas)
    else:
        message = answer.choices[0].message
        reasoning, text = message.reasoning_content, message.content
    assert 8 <= len(reasoning) <= 40
    assert text.strip().endswith(".")
    assert "think>" not in reasoning + text


@pytest.mark.slow
def test_a_response_goes_on_from_the_one_before(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "max_output_tokens": 24, "temperature": 0}
    first = client.responses.create(input="My cat is called Heron.", **options)
    asked = "What is my cat called? Answer with the name alone."
    second = client.responses.create(input=asked, previous_response_id=first.id, **options)
    assert "Heron" in second.output_text
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.input_tokens_details.cached_tokens > 0
    alone = client.responses.create(input=asked, **options)
    assert "Heron" not in alone.output_text


@pytest.mark.slow
def test_counted_tokens_are_those_the_engine_gets(
    coder: Serve, claude: anthropic.Anthropic
) -> None:
    conversation: Any = {
        "model": MODEL,
        "system": [{"type": "text", "text": "You are terse."}, {"type": "text", "text": "Use é."}],
        "tools": CLAUDE_TOOLS,
        "messages": [
            *QUESTION,
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "On it."},
                    {
                        "type": "tool_use",
                        "id": "toolu_1",
                        "name": "read_file",
                        "input": {"path": "a.py"},
                    },
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "print('日本')"}
                ],
            },
        ],
    }
    counted = claude.messages.count_tokens(**conversation).input_tokens
    with coder.servicer() as channel:
        before = coder.wait_until_idle(channel)
        answer = claude.messages.create(max_tokens=4, **conversation)
        after = coder.wait_until_idle(channel)
    prompt_tokens = after["prompt_tokens"] - before["prompt_tokens"]
    assert prompt_tokens == counted > 200
    usage = answer.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted


@pytest.mark.slow
def test_a_client_that_leaves_gives_its_pages_back(coder: Serve, client: openai.OpenAI) -> None:
    with coder.servicer() as channel:
        before = coder.wait_until_idle(channel)
        stream = chat(client, stream=True, max_tokens=700, extra_body={"ignore_eos": True})
        for _ in range(3):
            next(stream)
        stream.close()
        after = coder.wait_until_idle(channel)
    assert after["output_tokens"] - before["output_tokens"] < 600
    assert after["pages_active"] == 0
