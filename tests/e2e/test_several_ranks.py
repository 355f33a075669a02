"""An engine of several ranks: one text, and one clear end when a rank dies or hangs."""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from tests.e2e.serving import Serve
from tests.models.test_tiny_models import prompt
from tests.models.tiny import write_tiny
from tokenspeed import LLM, AsyncLLM, SamplingParams
from tokenspeed.core.errors import ConfigError, EngineError, TokenSpeedError
from tokenspeed.engine.rank_launch import _Child
from tokenspeed.engine.ranks import GroupRunner
from tokenspeed.loader import ModelFiles

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_new_tokens=400, ignore_eos=True)
PROMPTS = ["def fib(n):", "The capital of France is", "1, 2, 3, 4, 5, 6, 7,"]
# Weights that are not packed: rounding inputs to bytes would amplify the last bits, in which two
# ranks' sums differ from one's.
DENSE = {"gemm.linear": "reference", "gemm.logits": "reference", "embedding.lookup": "reference"}
# Chunks of 24 tokens, and pages of 16 on each rank.
IN_CHUNKS: dict[str, Any] = {
    "dtype": "float32",
    "max_context": 512,
    "max_running": 4,
    "max_step_tokens": 24,
    "page_size": 16,
    "kernels": DENSE,
}
LONG_PROMPT = " ".join(f"step {number}:" for number in range(60))


def followers(llm: LLM) -> list[int]:
    runner = llm._core.runner
    assert isinstance(runner, GroupRunner)
    found = []
    for member in runner._group.members:
        assert isinstance(member, _Child)
        found.append(member.process.pid)
    return found


def texts(llm: LLM, prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    return [output.completions[0].token_ids for output in llm.generate(list(prompts), GREEDY)]


@pytest.fixture(scope="module")
def alone(smollm2: ModelFiles) -> tuple[list[list[int]], float]:
    """What one rank answers to the long prompt and the others, and its bytes of KV a token."""
    with LLM(str(smollm2.path), **IN_CHUNKS) as llm:
        size_bytes = llm.info.kv_size_bytes / (llm.info.pages * llm.info.page_size)
        return texts(llm, [LONG_PROMPT, *PROMPTS]), size_bytes


@pytest.mark.slow
def test_two_ranks_give_the_text_of_one(
    smollm2: ModelFiles, alone: tuple[list[list[int]], float]
) -> None:
    # Those of one rank were made in chunks, and beside another.
    _, *wanted = alone[0]
    options = {"dtype": "float32", "max_context": 512, "max_running": 4, "kernels": DENSE}
    with LLM(str(smollm2.path), tp=2, **options) as llm:
        assert texts(llm) == wanted
        processes = followers(llm)
        # The second time prompts come from the cache, whose pages every rank has its part of.
        assert texts(llm) == wanted
        assert llm.stats().cached_tokens > 0 or llm.info.page_size > 8
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_contexts_give_the_text_of_one(
    smollm2: ModelFiles, alone: tuple[list[list[int]], float], ranks: int
) -> None:
    wanted, whole_size_bytes = alone
    prompts = [LONG_PROMPT, *PROMPTS]
    with LLM(str(smollm2.path), cp=ranks, **IN_CHUNKS) as llm:
        assert texts(llm, prompts) == wanted
        before = llm.stats().cached_tokens
        assert texts(llm, prompts) == wanted
        # The second time the first prompt comes from the cache, of which each rank has its part.
        assert llm.stats().cached_tokens - before >= 128
        assert llm.info.page_size == 16 * ranks
        size_bytes = llm.info.kv_size_bytes / (llm.info.pages * llm.info.page_size)
        assert size_bytes == whole_size_bytes / ranks


@pytest.mark.slow
def test_ranks_that_share_latents_give_the_text_of_one(tmp_path: Path) -> None:
    write_tiny("deepseek-v3", tmp_path)
    words = tokenizers.Tokenizer(WordLevel({f"w{token}": token for token in range(199)}))
    words.decoder = ByteLevel()
    words.save(str(tmp_path / "tokenizer.json"))
    # Chunks of 24 tokens, and pages of 8 on each rank.
    options = {
        "dtype": "float32",
        "max_context": 384,
        "max_running": 4,
        "max_step_tokens": 24,
        "page_size": 8,
    }
    prompts = [prompt(200, seed=1), prompt(5, seed=2), prompt(40, seed=3)]

    def all_tokens(llm: LLM) -> list[list[int]]:
        return [output.completions[0].token_ids for output in llm.generate(prompts, GREEDY)]

    with LLM(str(tmp_path), **options) as llm:
        alone = all_tokens(llm)
        whole_size_bytes = llm.info.kv_size_bytes / (llm.info.pages * llm.info.page_size)
    with LLM(str(tmp_path), cp=2, tp=2, **options) as llm:
        assert all_tokens(llm) == alone
        before = llm.stats().cached_tokens
        assert all_tokens(llm) == alone
        # The second time prompts come from the cache, of which each rank has its part.
        assert llm.stats().cached_tokens - before >= 192 + 32
        # Latents are the same for all heads: ranks of `tp` keep them whole.
        size_bytes = llm.info.kv_size_bytes / (llm.info.pages * llm.info.page_size)
        assert size_bytes == whole_size_bytes / 2


@pytest.mark.slow
def test_with_native_kernels_the_text_does_not_depend_on_the_batch(smollm2: ModelFiles) -> None:
    with LLM(str(smollm2.path), tp=2, max_context=512, max_running=4) as llm:
        together = texts(llm)
        apart = [llm.generate([prompt], GREEDY)[0].completions[0].token_ids for prompt in PROMPTS]
    assert together == apart


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [(signal.SIGKILL, "ended: killed by SIGKILL"), (signal.SIGSTOP, "does not answer")],
)
def test_a_rank_that_is_lost_ends_the_engine_with_its_name(
    smollm2: ModelFiles, how: signal.Signals, words: str
) -> None:
    with LLM(str(smollm2.path), tp=2, max_context=512, max_running=4) as llm:
        texts(llm)
        (process,) = followers(llm)
        os.kill(process, how)
        began_s = time.monotonic()
        with pytest.raises(EngineError, match=rf"rank 1 \(process {process}\) {words}"):
            texts(llm)
        assert time.monotonic() - began_s < 30
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.slow
def test_the_client_of_an_engine_process_is_told_which_rank_was_lost(smollm2: ModelFiles) -> None:
    async def run() -> tuple[int, str, list[psutil.Process]]:
        async with await AsyncLLM.start(
            str(smollm2.path), tp=2, max_context=512, max_running=4
        ) as llm:
            ranks = psutil.Process(llm.pid).children()
            count = 0
            try:
                async for delta in llm.generate(PROMPTS[1], LONG):
                    count += len(delta.token_ids)
                    if count == 8:
                        ranks[0].kill()
            except EngineError as error:
                return count, str(error), ranks
        return count, "", ranks

    count, message, ranks = asyncio.run(run())
    assert count >= 8
    assert "rank 1" in message and "killed by SIGKILL" in message
    psutil.wait_procs(ranks, 30)
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_ranks_end_when_the_engine_is_killed(smollm2: ModelFiles) -> None:
    async def run() -> list[psutil.Process]:
        async with await AsyncLLM.start(
            str(smollm2.path), tp=2, max_context=512, max_running=4
        ) as llm:
            engine = psutil.Process(llm.pid)
            ranks = engine.children()
            engine.kill()
            return ranks

    gone, alive = psutil.wait_procs(asyncio.run(run()), 30)
    assert gone and not alive


def test_what_several_ranks_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="--overlap-depth 1 needs one rank"):
        LLM("smollm2-135m", tp=2, overlap_depth=1)
    with pytest.raises(ConfigError, match="--ep 3 does not divide the 2 ranks"):
        LLM("smollm2-135m", tp=2, ep=3)


@pytest.mark.slow
def test_a_model_that_cannot_be_divided_is_refused_whole(smollm2: ModelFiles) -> None:
    with pytest.raises(TokenSpeedError, match="4 ranks cannot divide"):
        LLM(str(smollm2.path), tp=4, max_context=512)


@pytest.mark.slow
def test_two_ranks_are_served_through_the_gateway(qwen_coder: ModelFiles, tmp_path: Path) -> None:
    with Serve(tmp_path / "log", "--tp", "2", model=str(qwen_coder.path)) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
        question = {"role": "user", "content": "Name the capital of France in one word."}
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[question],  # type: ignore[list-item]
            temperature=0.0,
            max_tokens=16,
        )
    assert "Paris" in (answer.choices[0].message.content or "")
