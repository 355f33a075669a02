"""Real weights: logits against `transformers` on the same tensors, and bfloat16 against float32.

Legend: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.prompts import PROMPTS
from tests.models.tiny import build
from tests.support.forward import Driver
from tokenspeed import loader
from tokenspeed.kernels import registry
from tokenspeed.modeling import Model

TEXT = '''def quicksort(items):
    """Sort a list by divide and conquer."""
    if len(items) < 2:
        return items
    pivot = items[len(items) // 2]
    return quicksort([x for x in items if x < pivot]) + [pivot]
'''
NEW_TOKENS = 32
REFERENCE = dict.fromkeys(registry.ops, "reference")
NATIVE = {
    op: "cpu"
    for op in registry.ops
    if any(kernel.solution == "cpu" for kernel in registry.candidates(op))
}
MODELS = ["smollm2-135m", pytest.param("qwen2.5-coder-0.5b", marks=pytest.mark.slow)]


class Weights(NamedTuple):
    """A checkpoint, read once."""

    hf_config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    tokenizer: loader.Tokenizer


@pytest.fixture(scope="module", params=MODELS)
def weights(request: pytest.FixtureRequest) -> Iterator[Weights]:
    files = loader.resolve(request.param)
    checkpoint = loader.open_checkpoint(files)
    yield Weights(
        hf_config=checkpoint.hf_config,
        tensors=dict(checkpoint.tensors()),
        tokenizer=loader.Tokenizer(files.tokenizer_dir),
    )


def ours(weights: Weights, dtype: torch.dtype, overrides: dict[str, str]) -> Model:
    model = build(
        weights.hf_config, dtype=dtype, overrides=overrides, native_formats=overrides is NATIVE
    )
    model.load_weights(weights.tensors.items())
    return model


def theirs(weights: Weights, tokens: list[int]) -> torch.Tensor:
    """float32 logits of `transformers`, on the very tensors."""
    config = AutoConfig.for_model(**weights.hf_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = model.load_state_dict(weights.tensors, strict=False, assign=True)
    model.tie_weights()
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}
    # Its buffers are computed, not loaded.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.tensor([tokens])).logits[0]
    return logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_logits_equal_those_of_transformers_on_the_same_weights(weights: Weights) -> None:
    tokens = weights.tokenizer.encode(TEXT)
    expected_TV = theirs(weights, tokens)
    for overrides in (REFERENCE, NATIVE):
        single = Driver(ours(weights, torch.float32, overrides)).prefill(tokens, chunk=48)
        assert relative_error(single, expected_TV) <= 1e-4
        half = Driver(ours(weights, torch.bfloat16, overrides)).prefill(tokens, chunk=48)
        assert relative_error(half, expected_TV) <= 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("weights", MODELS[:1], indirect=True)
def test_greedy_text_of_bfloat16_equals_that_of_float32(weights: Weights) -> None:
    prompts = [weights.tokenizer.encode(text) for text in PROMPTS]
    single, half = (
        continuations(ours(weights, dtype, REFERENCE), prompts)
        for dtype in (torch.float32, torch.bfloat16)
    )
    same = sum(one == other for one, other in zip(single, half, strict=True))
    assert same >= 18, f"only {same} of {len(prompts)} texts are the same"


@pytest.mark.slow
def test_native_kernels_lose_hardly_more_in_bfloat16_than_the_reference(weights: Weights) -> None:
    # Which texts that hang on a near-tie turn depends on the last bits of every kernel, so what
    # native kernels are held to is the error of their logits. They round the weights of attention
    # to bfloat16, which the reference does not.
    prompts = [weights.tokenizer.encode(text) for text in PROMPTS]
    tokens = [token for prompt in prompts for token in prompt]
    exact_TV, reference_TV, native_TV = (
        Driver(ours(weights, dtype, overrides)).prefill(tokens, chunk=64)
        for dtype, overrides in (
            (torch.float32, REFERENCE),
            (torch.bfloat16, REFERENCE),
            (torch.bfloat16, NATIVE),
        )
    )
    error = relative_error(native_TV, exact_TV)
    allowed = relative_error(reference_TV, exact_TV)
    print(f"relative error of the logits: native {error:.5f}, reference {allowed:.5f}")
    assert error <= 1.12 * allowed


def continuations(model: Model, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of every prompt, decoded side by side."""
    driver = Driver(model, pages=len(prompts) * 10, page_size=16, slots=len(prompts))
    requests = [driver.request() for _ in prompts]
    following = [list(prompt) for prompt in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    for _ in range(NEW_TOKENS):
        logits_SV = driver.step(list(zip(requests, following, strict=True)))
        following = [[token] for token in logits_SV.argmax(-1).tolist()]
        for text, token in zip(texts, following, strict=True):
            text.extend(token)
    return texts
