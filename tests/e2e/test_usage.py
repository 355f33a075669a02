"""What the usage says, by each way to ask: whole and streamed it is the same.

Each request is asked a first time, so that the next prompts are cached as far as they can be.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import pytest

from .serving import Serve

MODEL = "smollm2-135m"
PAGE_SIZE = 32
CODE = "def load(self, page: int) -> list[str]:\n    token = self.find(page, 12)\n" * 6
MESSAGES: list[Any] = [{"role": "user", "content": f"Repeat this code:\n{CODE}"}]
TOKENS = 60


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What any of the APIs tells, in one form; None for what it has no field for."""

    prompt: int
    cached: int | None
    completion: int
    total: int | None
    accepted: int | None
    rejected: int | None

    def counts(self) -> tuple[int | None, ...]:
        """What hangs on the request alone: whether guesses are made hangs on the machine too."""
        return self.prompt, self.cached, self.completion, self.total


@pytest.fixture(scope="module")
def client(server: Serve) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: Serve) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def of_completions(usage: Any) -> Usage:
    prompts, guesses = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        prompt=usage.prompt_tokens,
        cached=prompts and prompts.cached_tokens,
        completion=usage.completion_tokens,
        total=usage.total_tokens,
        accepted=guesses and guesses.accepted_prediction_tokens,
        rejected=guesses and guesses.rejected_prediction_tokens,
    )


def chat(client: openai.OpenAI, stream: bool) -> Usage:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": TOKENS,
        "temperature": 0,
    }
    if not stream:
        return of_completions(client.chat.completions.create(**asked).usage)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    return of_completions(chunks[-1].usage)


def completion(client: openai.OpenAI, stream: bool) -> Usage:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": CODE,
        "max_tokens": TOKENS,
        "temperature": 0,
    }
    if not stream:
        return of_completions(client.completions.create(**asked).usage)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    return of_completions(chunks[-1].usage)


def response(client: openai.OpenAI, stream: bool) -> Usage:
    asked: dict[str, Any] = {
        "model": MODEL,
        "input": MESSAGES,
        "max_output_tokens": TOKENS,
        "temperature": 0,
    }
    if stream:
        (done,) = [
            event.response
            for event in client.responses.create(**asked, stream=True)
            if event.type in ("response.completed", "response.incomplete")
        ]
        usage = done.usage
    else:
        usage = client.responses.create(**asked).usage
    return Usage(
        prompt=usage.input_tokens,
        cached=usage.input_tokens_details.cached_tokens,
        completion=usage.output_tokens,
        total=usage.total_tokens,
        accepted=None,
        rejected=None,
    )


def message(claude: anthropic.Anthropic, stream: bool) -> Usage:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": TOKENS,
        "extra_body": {"temperature": 0},
    }
    if stream:
        with claude.messages.stream(**asked) as events:
            usage = events.get_final_message().usage
    else:
        usage = claude.messages.create(**asked).usage
    return Usage(
        prompt=usage.input_tokens + (usage.cache_read_input_tokens or 0),
        cached=usage.cache_read_input_tokens,
        completion=usage.output_tokens,
        total=None,
        accepted=None,
        rejected=None,
    )


def test_each_api_counts_alike_whole_and_streamed(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    asked = {
        "chat": lambda stream: chat(client, stream),
        "completions": lambda stream: completion(client, stream),
        "responses": lambda stream: response(client, stream),
        "messages": lambda stream: message(claude, stream),
    }
    for name, ask in asked.items():
        first, whole, streamed = ask(False), ask(False), ask(True)
        assert (name, streamed.counts()) == (name, whole.counts())
        assert (name, first.prompt) == (name, whole.prompt)
        assert first.completion == whole.completion == TOKENS
        assert whole.total in (None, whole.prompt + TOKENS)
        full = (whole.prompt - 1) // PAGE_SIZE * PAGE_SIZE
        # On /v1/messages the gateway says 0, whatever it was told.
        assert (name, whole.cached) == (name, 0 if name == "messages" else full)
        for usage in (first, whole, streamed) if name == "chat" else ():
            assert usage.accepted is not None
            assert usage.rejected is not None
            assert 0 <= usage.accepted < TOKENS
            assert usage.rejected >= 0
    # One conversation is as long whoever asks.
    prompt = chat(client, stream=False).prompt
    assert response(client, stream=True).prompt == message(claude, stream=True).prompt == prompt
