"""The official clients, through the gateway, to a real model."""

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from .serving import Serve

MODEL = "smollm2-135m"
# A question whose answer the model is sure of: no rounding turns it.
QUESTION: list[Any] = [{"role": "user", "content": "Name the capital of France."}]
PAGE_SIZE = 32


@pytest.fixture(scope="module")
def client(server: Serve) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: Serve) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def greedy_text(client: openai.OpenAI) -> str:
    """The model's greedy answer to the question, 24 tokens at most."""
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=24, temperature=0
    )
    text = answer.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    return text


def test_the_ready_line_names_model_and_url(server: Serve) -> None:
    assert f"TokenSpeed serves {MODEL} at {server.url}/v1 (ready in " in server.ready_line


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_streamed_chat_has_the_same_text_and_counts(
    client: openai.OpenAI, greedy_text: str
) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == greedy_text
    assert sum(bool(piece) for piece in pieces) > 1
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens > 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(
    client: openai.OpenAI, greedy_text: str, stream: bool
) -> None:
    # A piece from the middle, which begins inside one token and ends inside another.
    middle = len(greedy_text) // 2
    stop = greedy_text[middle : middle + 4]
    answer: Any = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=24, temperature=0, stop=[stop], stream=stream
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in chunks)
        reason = chunks[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == (greedy_text[: greedy_text.index(stop)], "stop")


def test_a_seed_gives_the_same_text_and_samples_of_their_own(client: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Invent a word."}],
            max_tokens=12,
            temperature=1.5,
            **options,
        )
        return [choice.message.content for choice in answer.choices]

    once = texts(seed=7)
    assert texts(seed=7) == once
    assert texts(seed=8) != once
    first, second = texts(seed=7, n=2)
    assert first != second


def test_logprobs_are_those_of_the_tokens(client: openai.OpenAI, greedy_text: str) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0] <= 0.0


def test_a_repeated_context_comes_from_the_cache(client: openai.OpenAI) -> None:
    text = " ".join(f"item {n}" for n in range(60))

    def usage() -> Any:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=2
        )
        return answer.usage

    usage()
    second = usage()
    full_pages = (second.prompt_tokens - 1) // PAGE_SIZE
    assert full_pages > 3
    assert second.prompt_tokens_details.cached_tokens == full_pages * PAGE_SIZE


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert "Paris" in answer.choices[0].text
    pieces = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == (
        answer.choices[0].text
    )


def test_responses(client: openai.OpenAI, greedy_text: str) -> None:
    answer = client.responses.create(
        model=MODEL, input=QUESTION[0]["content"], max_output_tokens=24, temperature=0
    )
    assert answer.output_text == greedy_text
    pieces = [
        event.delta
        for event in client.responses.create(
            model=MODEL,
            input=QUESTION[0]["content"],
            max_output_tokens=24,
            temperature=0,
            stream=True,
        )
        if event.type == "response.output_text.delta"
    ]
    assert "".join(pieces) == greedy_text


def test_messages_and_their_token_count(claude: anthropic.Anthropic, greedy_text: str) -> None:
    # The client has no such parameter any more, but the protocol has.
    answer = claude.messages.create(
        model=MODEL, messages=QUESTION, max_tokens=24, extra_body={"temperature": 0}
    )
    (block,) = answer.content
    assert block.type == "text"
    assert block.text == greedy_text
    counted = claude.messages.count_tokens(model=MODEL, messages=QUESTION)
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_streamed_messages(claude: anthropic.Anthropic, greedy_text: str) -> None:
    with claude.messages.stream(
        model=MODEL, messages=QUESTION, max_tokens=24, extra_body={"temperature": 0}
    ) as stream:
        assert "".join(stream.text_stream) == greedy_text
        assert stream.get_final_message().stop_reason == "end_turn"
