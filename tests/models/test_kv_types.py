"""KV of another type than the model: text, room, and what cannot be had."""

import pytest
import torch

from tokenspeed import LLM, SamplingParams
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError
from tokenspeed.engine.build import build_engine
from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.loader import ModelFiles

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=20, ignore_eos=True)
LINES = " ".join(f"line {n} reads page {n * 7 % 100} and writes it." for n in range(60))


def greedy(llm: LLM, texts: list[str]) -> list[list[int]]:
    prompts = [llm.tokenizer.encode(text) for text in texts]
    return [output.completions[0].token_ids for output in llm.generate(prompts, GREEDY)]


def load(model: ModelFiles, *, kv_dtype: str, chunk: int, running: int = 8) -> LLM:
    return LLM(
        str(model.path),
        kv_dtype=kv_dtype,
        max_context=2048,
        max_running=running,
        max_step_tokens=chunk,
        kv_cache_size_bytes=96 << 20,
    )


def test_rounded_kv_gives_one_text_however_it_was_computed(smollm2: ModelFiles) -> None:
    """Alone, in other chunks, together, and from the cache; twice as many pages fit."""
    texts = [f"{LINES} Then {word} does" for word in ("the reader", "a writer")] + ["def page("]
    with load(smollm2, kv_dtype="bfloat16", chunk=512) as llm:
        tokens = llm.info.pages * llm.info.page_size
        assert llm.info.kv_size_bytes == tokens * 30 * 2 * 3 * 64 * 2
    with load(smollm2, kv_dtype="int8", chunk=512, running=1) as llm:
        assert llm.info.kv_size_bytes == llm.info.pages * llm.info.page_size * 30 * 2 * 3 * 68
        assert llm.info.pages * llm.info.page_size > 1.88 * tokens
        alone = [greedy(llm, [text])[0] for text in texts]
    with load(smollm2, kv_dtype="int8", chunk=48) as llm:
        assert greedy(llm, texts) == alone
        assert greedy(llm, texts) == alone
        assert llm.stats().cached_tokens > 1000


def test_a_capital_is_known_whatever_the_kv(smollm2: ModelFiles) -> None:
    for kv_dtype in ("float32", "int8", "float8_e4m3fn"):
        with load(smollm2, kv_dtype=kv_dtype, chunk=128) as llm:
            chat = [{"role": "user", "content": "Name the capital of France."}]
            assert "Paris" in llm.chat(chat, GREEDY).completions[0].text


def test_what_cannot_be_rounded_names_the_flag(smollm2: ModelFiles) -> None:
    config = EngineConfig(model=str(smollm2.path), kv_dtype="int8", page_size=24)
    with pytest.raises(ConfigError, match=r"--kv-dtype int8 needs pages .* --page-size is 24"):
        build_engine(config)
    kernels = KernelSelector(
        device=torch.device("cpu"), dtype=torch.bfloat16, kv_formats=("interleaved_int8",)
    )
    family = (ops.kvcache.append, ops.attention.paged_mha)
    assert kernels.kv_format(*family, head_dim=64) == "interleaved_int8"
    with pytest.raises(ConfigError, match=r"--kv-dtype int8 needs kernels .* --kv-dtype auto"):
        kernels.kv_format(*family, head_dim=20)
    with pytest.raises(ConfigError, match="kv_dtype must be one of auto, float32, bfloat16, int8"):
        EngineConfig(model="m", kv_dtype="int4")
