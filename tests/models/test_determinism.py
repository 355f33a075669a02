"""Greedy text does not depend on what shares the batch, on chunking, or on the cache."""

from collections.abc import Sequence

import numpy as np
import pytest

from tokenspeed import LLM, SamplingParams
from tokenspeed.loader import ModelFiles

NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
WORDS = (
    "def class return import the a buffer parses tokens of file error test value index list when "
    "scheduler pages cache loop reads writes and checks every request"
)


def prompts(llm: LLM) -> list[list[int]]:
    """32 prompts of 3 to about 400 tokens; the odd ones share a long beginning."""
    rng = np.random.Generator(np.random.Philox(7))
    words = WORDS.split()
    shared = " ".join(rng.choice(words, size=150))
    texts = []
    for index in range(32):
        own = " ".join(rng.choice(words, size=2 + 5 * index))
        texts.append(f"{shared} {own}" if index % 2 else f"{index} {own}")
    return [llm.tokenizer.encode(text) for text in texts]


def greedy(llm: LLM, wanted: Sequence[Sequence[int]]) -> list[list[int]]:
    return [output.completions[0].token_ids for output in llm.generate(wanted, GREEDY)]


@pytest.mark.slow
def test_greedy_text_is_the_same_alone_together_chunked_and_cached(smollm2: ModelFiles) -> None:
    def load(*, chunk: int, running: int, cache: bool) -> LLM:
        return LLM(
            str(smollm2.path),
            dtype="float32",
            max_context=1024,
            max_step_tokens=chunk,
            max_running=running,
            prefix_cache=cache,
        )

    with load(chunk=512, running=1, cache=False) as llm:
        wanted = prompts(llm)
        alone = greedy(llm, wanted)
    found: dict[str, list[list[int]]] = {}
    for chunk in (16, 64, 512):
        with load(chunk=chunk, running=min(chunk, 32), cache=True) as llm:
            found[f"together, chunks of {chunk}, cold"] = greedy(llm, wanted)
            if chunk == 512:
                found["together, warm"] = greedy(llm, wanted)
                assert llm.stats().cached_tokens > 1000
                found["alone, warm"] = [greedy(llm, [prompt])[0] for prompt in wanted]
    different = {
        how: [index for index in range(len(alone)) if alone[index] != texts[index]]
        for how, texts in found.items()
    }
    assert not any(different.values()), different
