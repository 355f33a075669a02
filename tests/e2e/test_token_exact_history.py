"""A sampled answer comes back through the real gateway, and is served as it was sampled."""

import itertools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

from tokenspeed import LLM
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.engine.outputs import GenerationOutput
from tokenspeed.loader import ModelFiles, Tokenizer

from .serving import Serve

MODEL = "smollm2-135m"
PAGE_SIZE = 32
ANSWER_TOKENS = 150
_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A first turn: its prompt, and an answer in tokens that are not the tokenizer's own."""

    messages: list[dict[str, str]]
    prompt: list[int]
    answer: list[int]
    text: str


@pytest.fixture(scope="module")
def tokenizer(smollm2: ModelFiles) -> Tokenizer:
    return Tokenizer(smollm2.tokenizer_dir)


@pytest.fixture(scope="module")
def sample(tokenizer: Tokenizer) -> Callable[[Serve], Sampled]:
    """Samples a first turn, each with a question of its own.

    At so high a temperature the letters come in any pieces; that they are letters keeps the text
    from being no UTF-8. It is asked of the servicer, past the gateway, which tells no tokens.
    """

    def asked(server: Serve) -> Sampled:
        number = next(_numbers)
        messages = [{"role": "user", "content": f"Say {number} words."}]
        prompt = tokenizer.encode(tokenizer.render_chat(messages))
        request = pb.GenerateRequest(
            request_id=str(uuid.uuid4()),
            tokenized=pb.TokenizedInput(input_ids=prompt),
            sampling_params=pb.SamplingParams(
                temperature=2.0,
                regex="[a-z ]{2000}",
                sampling_seed=number,
                max_new_tokens=ANSWER_TOKENS,
            ),
        )
        with server.servicer() as channel:
            stub = pb_grpc.TokenSpeedSchedulerStub(channel)
            (message,) = stub.Generate(request)
        answer = list(message.complete.output_ids)
        text = tokenizer.decode(answer)
        assert len(answer) == ANSWER_TOKENS
        assert tokenizer.encode(text) != answer
        return Sampled(messages=messages, prompt=prompt, answer=answer, text=text)

    return asked


@pytest.fixture(scope="module")
def openai_client(server: Serve) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def second_turn(sampled: Sampled) -> list[dict[str, str]]:
    return [
        *sampled.messages,
        {"role": "assistant", "content": sampled.text},
        {"role": "user", "content": "And then?"},
    ]


def ask(api: str, server: Serve, messages: list[Any]) -> int:
    """Have a turn answered through an API; its prompt tokens."""
    if api == "messages":
        with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            client.messages.create(model=MODEL, messages=messages, max_tokens=4)
            return client.messages.count_tokens(model=MODEL, messages=messages).input_tokens
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        if api == "responses":
            usage = client.responses.create(model=MODEL, input=messages, max_output_tokens=4).usage
            assert usage is not None
            return usage.input_tokens
        chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4).usage
    assert chat is not None
    return chat.prompt_tokens


def cached_tokens(client: openai.OpenAI, messages: list[Any], **options: Any) -> int:
    """What the usage of a chat says of the cache."""
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, **options)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


@pytest.mark.parametrize("api", ["chat", "messages", "responses"])
def test_a_sampled_answer_is_cached_when_it_comes_back(
    api: str, server: Serve, sample: Callable[[Serve], Sampled], tokenizer: Tokenizer
) -> None:
    sampled = sample(server)
    messages = second_turn(sampled)
    with server.servicer() as channel:
        before = server.wait_until_idle(channel)
        sent = ask(api, server, messages)
        after = server.wait_until_idle(channel)
    assert sent == len(tokenizer.encode(tokenizer.render_chat(messages)))
    # Whole pages of what was served, but for the last token, which was never fed.
    pages = (len(sampled.prompt) + ANSWER_TOKENS - 1) // PAGE_SIZE
    assert after["cached_tokens"] - before["cached_tokens"] == pages * PAGE_SIZE
    assert after["history_prompts"] - before["history_prompts"] == 1


def test_usage_counts_cached_tokens_as_the_gateway_sent_them(
    sample: Callable[[Serve], Sampled],
    server: Serve,
    tokenizer: Tokenizer,
    openai_client: openai.OpenAI,
) -> None:
    sampled = sample(server)
    cached = cached_tokens(openai_client, second_turn(sampled))
    served = [*sampled.prompt, *sampled.answer]
    pages = (len(served) - 1) // PAGE_SIZE
    spelled = len(tokenizer.decode(served[: pages * PAGE_SIZE], skip_special=False))
    rendered = tokenizer.render_chat(second_turn(sampled))
    # All of it is ASCII, and so a character a byte.
    ends = itertools.accumulate(
        len(tokenizer.bytes_of(token)) for token in tokenizer.encode(rendered)
    )
    assert cached == sum(end <= spelled for end in ends)


def test_a_later_turn_goes_on_from_the_substituted_one(
    server: Serve, sample: Callable[[Serve], Sampled], openai_client: openai.OpenAI
) -> None:
    sampled = sample(server)
    messages: list[Any] = second_turn(sampled)
    for _ in range(2):
        answer = openai_client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=40, temperature=1.5, seed=1
        )
        assert answer.usage is not None
        served = answer.usage.total_tokens
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "And then?"},
        ]
    assert cached_tokens(openai_client, messages) > served - 3 * PAGE_SIZE


def logprobs_of(output: GenerationOutput) -> np.ndarray[Any, np.dtype[np.float32]]:
    entries = output.completions[0].logprobs
    assert entries is not None
    return np.array([entry.logprob for entry in entries], np.float32)


def test_the_continuation_is_that_of_a_cold_engine_with_the_served_tokens(
    server: Serve,
    sample: Callable[[Serve], Sampled],
    tokenizer: Tokenizer,
    openai_client: openai.OpenAI,
) -> None:
    sampled = sample(server)
    messages: list[Any] = second_turn(sampled)
    answer = openai_client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=24, temperature=0, logprobs=True
    )
    rendered = tokenizer.render_chat(messages)
    before = tokenizer.decode(sampled.prompt, skip_special=False) + sampled.text
    assert rendered.startswith(before)
    ids = sampled.prompt + sampled.answer + tokenizer.encode(rendered.removeprefix(before))
    with LLM(MODEL, max_context=1024, max_running=2) as llm:
        params = SamplingParams(temperature=0.0, max_new_tokens=24, logprobs=0)
        cold, came = llm.generate([ids, tokenizer.encode(rendered)], params)
    assert answer.choices[0].message.content == cold.completions[0].text
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    logprobs = np.array([entry.logprob for entry in found.content], np.float32)
    assert np.array_equal(logprobs, logprobs_of(cold)[: len(logprobs)])
    # Else the test would tell nothing.
    assert not np.array_equal(logprobs, logprobs_of(came)[: len(logprobs)])


def test_other_tenants_get_their_prompts_as_they_came(
    server: Serve, sample: Callable[[Serve], Sampled], openai_client: openai.OpenAI
) -> None:
    sampled = sample(server)
    with server.servicer() as channel:
        before = server.counters(channel)
        cached = cached_tokens(
            openai_client, second_turn(sampled), extra_headers={"x-request-id": "tenant=other"}
        )
        after = server.counters(channel)
    # Neither the tokens nor their KV.
    assert after["history_prompts"] == before["history_prompts"]
    assert cached == 0


def test_without_token_exact_history_the_cache_ends_at_the_first_other_token(
    sample: Callable[[Serve], Sampled], tmp_path: Path
) -> None:
    with Serve(tmp_path / "log", "--no-token-exact-history") as server:
        sampled = sample(server)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            assert cached_tokens(client, second_turn(sampled)) < len(sampled.prompt) + PAGE_SIZE
