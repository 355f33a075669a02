"""`LLM` and `AsyncLLM` on real weights."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from tokenspeed import LLM, AsyncLLM, SamplingParams
from tokenspeed.core.errors import (
    ConfigError,
    ContextOverflow,
    EngineDead,
    InsufficientMemory,
    InvalidParameter,
    KernelError,
    ModelNotFound,
)
from tokenspeed.core.step import FinishReason
from tokenspeed.loader import ModelFiles

# A question whose answer the model is sure of: no rounding turns it.
CHAT = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def llm(smollm2: ModelFiles) -> Iterator[LLM]:
    # In bfloat16 the reference kernels let a batch show in the last bits of its rows.
    with LLM(str(smollm2.path), dtype="float32", max_context=2048, max_running=8) as loaded:
        yield loaded


def test_a_chat_is_answered(llm: LLM) -> None:
    output = llm.chat(CHAT, SamplingParams(temperature=0.0, max_new_tokens=32))
    completion = output.completions[0]
    assert "Paris" in completion.text
    assert completion.finish_reason is FinishReason.STOP
    assert completion.stop in llm.info.eos_token_ids


def test_a_second_turn_finds_every_full_page_of_the_first(llm: LLM) -> None:
    prompt = llm.tokenizer.encode(" ".join(f"line {n}" for n in range(100)))
    params = SamplingParams(temperature=0.0, max_new_tokens=40, ignore_eos=True)
    first = llm.generate([prompt], params)[0]
    context = prompt + first.completions[0].token_ids
    second = llm.generate([[*context, *prompt[:5]]], params)[0]
    # The KV of the last sampled token does not exist: it was never fed.
    page_size = llm.info.page_size
    assert second.cached_tokens == (len(context) - 1) // page_size * page_size


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=32, stop=("Paris",))
    completion = llm.chat(CHAT, params).completions[0]
    assert "Paris" not in completion.text
    assert completion.stop == "Paris"
    assert completion.finish_reason is FinishReason.STOP


def test_seeds_repeat_and_completions_of_one_prompt_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=11, max_new_tokens=16, ignore_eos=True)
    first, again = (llm.chat(CHAT, params, n=3).completions for _ in range(2))
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert len({tuple(c.token_ids) for c in first}) > 1
    alone = llm.chat(CHAT, params).completions[0]
    assert alone.token_ids == first[0].token_ids


def test_logprobs_of_greedy_tokens_are_the_largest(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=5, logprobs=3, ignore_eos=True)
    completion = llm.chat(CHAT, params).completions[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids) == 5
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entry.top_token_ids[0] == token
        assert entry.top_logprobs[0] == pytest.approx(entry.logprob)
        assert entry.top_logprobs == sorted(entry.top_logprobs, reverse=True)
        assert len(entry.top_logprobs) == 3


def test_more_prompts_than_slots_all_finish_and_leave_the_pool_whole(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
    outputs = llm.generate([f"number {n} is" for n in range(20)], params)
    assert [len(o.completions[0].token_ids) for o in outputs] == [8] * 20
    stats = llm.stats()
    assert stats.pages_active == stats.running == stats.waiting == 0
    assert stats.pages_free + stats.pages_cached == stats.pages_total


def test_wrong_requests_say_what_is_wrong_and_run_nothing(llm: LLM) -> None:
    steps = llm.stats().steps
    with pytest.raises(ContextOverflow, match=r"2049 tokens.*--max-context"):
        llm.generate([[5] * 2049])
    with pytest.raises(InvalidParameter, match="outside the vocabulary of 49152"):
        llm.generate([[49152]])
    with pytest.raises(InvalidParameter, match="empty"):
        llm.generate([[]])
    with pytest.raises(InvalidParameter, match="temperature must be in"):
        SamplingParams(temperature=float("nan"))
    with pytest.raises(InvalidParameter, match="n must be in"):
        llm.generate("x", n=0)
    assert llm.stats().steps == steps


def test_a_huge_max_tokens_is_clamped_to_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=2**31 - 1, ignore_eos=True)
    output = llm.generate([[5] * 2030], params)[0]
    assert output.completions[0].finish_reason is FinishReason.LENGTH
    assert len(output.completions[0].token_ids) == 18


def test_wrong_options_say_which_flag_mends_them(smollm2: ModelFiles) -> None:
    path = str(smollm2.path)
    with pytest.raises(ConfigError, match=r"made for 8192 tokens"):
        LLM(path, max_context=10_000)
    with pytest.raises(InsufficientMemory, match="--max-context"):
        LLM(path, kv_cache_size_bytes=1 << 20)
    with pytest.raises(KernelError, match="reference"):
        LLM(path, kernels={"norm.rms_norm": "no-such-solution"})
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        LLM("no-such-model")


def test_retraction_changes_no_greedy_text(smollm2: ModelFiles) -> None:
    params = SamplingParams(temperature=0.0, max_new_tokens=100, ignore_eos=True)
    prompts = [f"{n} {n * n} {n * n * n}" for n in range(6)]
    # With drafts they would not be as long at the same time.
    options = {"dtype": "float32", "max_context": 256, "max_running": 8, "speculate": "off"}
    with LLM(str(smollm2.path), **options) as llm:
        token_size_bytes = llm.info.kv_size_bytes // (llm.info.pages * llm.info.page_size)
        wanted = [o.completions[0].token_ids for o in llm.generate(prompts, params)]
    with LLM(str(smollm2.path), kv_cache_size_bytes=token_size_bytes * 32 * 12, **options) as llm:
        found = [o.completions[0].token_ids for o in llm.generate(prompts, params)]
        assert llm.stats().retractions > 0
    assert found == wanted


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_async_streams_run_together_and_end_alone(smollm2: ModelFiles, overlap_depth: int) -> None:
    async def run() -> None:
        async with await AsyncLLM.start(
            str(smollm2.path), max_context=1024, overlap_depth=overlap_depth
        ) as llm:
            greedy = SamplingParams(temperature=0.0, max_new_tokens=32)

            async def text(index: int) -> str:
                pieces = []
                async for delta in llm.chat(CHAT, greedy):
                    pieces.append(delta.text)
                    if index == 3 and len(pieces) == 2:
                        break
                return "".join(pieces)

            texts = await asyncio.gather(*map(text, range(4)))
            assert "Paris" in texts[0]
            assert texts[0] == texts[1] == texts[2]
            assert texts[0].startswith(texts[3])
            assert (await llm.stats()).waiting == 0

            with pytest.raises(ContextOverflow):
                await anext(llm.generate([5] * 4000))

    asyncio.run(run())


def test_a_killed_engine_ends_every_stream_with_an_error(smollm2: ModelFiles) -> None:
    async def run() -> None:
        llm = await AsyncLLM.start(str(smollm2.path), max_context=1024)
        pid = llm.pid
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        stream = llm.generate("Once", params)
        await anext(stream)
        os.kill(pid, 9)
        with pytest.raises(EngineDead, match="SIGKILL"):
            async for _ in stream:
                pass
        with pytest.raises(EngineDead):
            await anext(llm.generate("Once", params))
        await llm.close()

    asyncio.run(run())
