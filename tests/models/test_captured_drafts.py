"""Rows with drafts in captured steps, with calls in place of CUDA graphs and Triton's kernels
interpreted: the bits of steps through Python, and nothing written but what is theirs."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.kernels.triton_cases import GPU, interpreting
from tests.models.test_captured_steps import Calls
from tests.support.grammars import grammar
from tests.support.triton_interpreter import needs_interpreter
from tests.unit.execution.tiny import CPU, SIZES, Planner, Request, config_of, ints
from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.core.samples import Samples
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import StepPlan, StepResult
from tokenspeed.execution import Runner
from tokenspeed.execution.captured import CapturedSteps
from tokenspeed.execution.recorded import record_steps
from tokenspeed.grammar import TokenTable
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling import Model, ModelConfig, build_model

pytestmark = needs_interpreter
__all__ = ["interpreting"]

LLAMA = {**SIZES, "num_hidden_layers": 2}
SMALL = {
    **SIZES,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LATENT = {
    **SMALL,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
# Layers of a window and layers that see all, in a cache group each; sinks; experts.
WINDOWS = {
    **SMALL,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5,
    "attention_bias": True,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "swiglu_limit": 7.0,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TABLE = TokenTable(
    texts=[*(letter.encode() for letter in LETTERS), b"</s>", *[b""] * 34], special=[26], ends=[26]
)
GREEDY = SamplingParams(temperature=0.0)
# Of each slot: what it samples by, and what its text must follow.
CASES = (
    (GREEDY, None),
    (SamplingParams(temperature=1.3, top_p=0.9, logprobs=2), None),
    (SamplingParams(temperature=0.0, repetition_penalty=1.4, logit_bias={7: 2.0}), None),
    (SamplingParams(temperature=0.9), "[a-m]+"),
)


def model_of(sizes: Mapping[str, Any], *, deterministic: bool) -> Model:
    kernels = KernelSelector(
        device=CPU, dtype=torch.float32, platform=GPU, deterministic=deterministic
    )
    model = build_model(
        ModelConfig.from_hf(dict(sizes)), dtype=torch.float32, device=CPU, kernels=kernels
    )
    generator = torch.Generator().manual_seed(3)
    for _, weight in model.weights():
        weight.data.copy_(torch.randn(weight.data.shape, generator=generator) * 0.6)
    return model


@dataclass(kw_only=True)
class Side:
    """A runner, its KV, and what was asked of it."""

    runner: Runner
    pools: KVPools
    capture: Calls
    requests: list[Request]
    planner: Planner

    @classmethod
    def of(
        cls,
        model: Model,
        config: SchedulerConfig,
        cases: Sequence[tuple[SamplingParams, str | None]],
        *,
        captured: bool,
    ) -> "Side":
        config = replace(config, groups=config.groups * len(model.kv_specs()))
        pages = config.groups[0].pages
        pools = KVPools(
            model.kv_specs(), pages=pages, page_size=config.page_size, device=CPU, padded=True
        )
        for pool in pools.pools:
            for parts in pool._layers:
                for part in parts:
                    # Whatever is read before somebody wrote it shows.
                    part.fill_(torch.nan)
        capture = Calls()
        runner = Runner(model, pools, config, device=CPU, threads=1, capture=capture)
        if captured:
            runner.record()
        capture.runs = 0
        requests = []
        for slot, (params, pattern) in enumerate(cases):
            prompt = np.random.default_rng(slot).integers(0, 26, 3 + 2 * slot).tolist()
            runner.bind(
                slot,
                params,
                seed=40 + slot,
                prompt_count=len(prompt),
                tokens=ints(prompt),
                stop_token_ids=ints([26]),
                grammar=pattern and grammar(StructuredOutputs(regex=pattern), TABLE),
            )
            requests.append(Request(slot=slot, prompt=prompt))
        return cls(
            runner=runner,
            pools=pools,
            capture=capture,
            requests=requests,
            planner=Planner(config),
        )

    def step(
        self, slots: Sequence[int], drafts: Mapping[int, list[int]], prompts: Sequence[int] = ()
    ) -> tuple[StepPlan, StepResult]:
        rows = [self.requests[slot] for slot in slots]
        chunks = [(self.requests[slot], len(self.requests[slot].prompt)) for slot in prompts]
        plan = self.planner.plan(rows, chunks, drafts=drafts)
        result = self.runner.launch(plan).result()
        counting_S = Samples.of(plan).counting(result.tokens)
        for row, request in enumerate(rows):
            draft = drafts.get(request.slot, [])
            # What a grammar cut off counts for nothing.
            most = 1 + result.cuts.get(request.slot, len(draft))
            counting = int(counting_S[plan.sample_rows == row].sum())
            self.planner.landed(request, draft, min(most, counting))
        return plan, result

    def kv(self) -> list[torch.Tensor]:
        """The bits of all pages that plans name."""
        return [
            part[: pool.pages].view(torch.int32)
            for pool in self.pools.pools
            for parts in pool._layers
            for part in parts
        ]


def same(found: StepResult, wanted: StepResult, counting_S: np.ndarray) -> None:
    """What counts is equal to the bit."""
    assert found.tokens[counting_S].tolist() == wanted.tokens[counting_S].tolist()
    assert (found.cuts, found.failures) == (wanted.cuts, wanted.failures)
    assert (found.logprobs is None) == (wanted.logprobs is None)
    if found.logprobs is not None and wanted.logprobs is not None:
        for name in ("sample_indices", "chosen", "top_token_ids", "top_values", "top_counts"):
            ours, theirs = getattr(found.logprobs, name), getattr(wanted.logprobs, name)
            assert ours.tobytes() == theirs.tobytes(), name


def test_captured_rows_with_drafts_have_the_bits_of_those_through_python() -> None:
    """Drafts of any mixture of lengths, right and wrong, cut by a grammar, behind one another, with
    rows and tokens that fill up."""
    model = model_of(LLAMA, deterministic=True)
    config = replace(config_of(slots_max=4, pages=40), step_drafts_max=16)
    captured, eager = (Side.of(model, config, CASES, captured=on) for on in (True, False))
    assert isinstance(captured.runner._steps.recorded, CapturedSteps)
    dice = random.Random(5)
    lasts: dict[int, int] = {}

    def both(
        slots: Sequence[int],
        lengths: Sequence[int],
        *,
        prompts: Sequence[int] = (),
        runs: int = 1,
    ) -> StepResult:
        drafts = {}
        for slot, length in zip(slots, lengths, strict=True):
            # Now and then what a small model repeats is guessed; 'z' is in no text of slot 3's.
            drafts[slot] = [
                lasts[slot] if dice.randrange(3) else dice.randrange(61) for _ in range(length)
            ]
            if slot == 3 and length > 2:
                drafts[slot][2] = 25
        plan, wanted = eager.step(slots, drafts, prompts)
        before = captured.capture.runs
        _, found = captured.step(slots, drafts, prompts)
        assert captured.capture.runs - before == runs
        counting_S = Samples.of(plan).counting(wanted.tokens)
        same(found, wanted, counting_S)
        for ours, theirs in zip(captured.kv(), eager.kv(), strict=True):
            assert torch.equal(ours, theirs)
        for sample in np.flatnonzero(counting_S).tolist():
            slot = int(plan.row_slots[plan.sample_rows[sample]])
            lasts[slot] = int(wanted.tokens[sample])
        return wanted

    both((), (), prompts=range(4), runs=0)
    both((0, 1, 2, 3), (0, 0, 0, 0))
    # Three rows fill a bucket of four.
    both((0, 2, 1), (1, 0, 1))
    assert both((1, 3, 0, 2), (3, 5, 0, 2)).cuts
    both((2, 0), (7, 4))
    # A step without drafts goes on from what a step with them chose.
    both((2, 1, 0), (0, 0, 0))
    both((3,), (1,))
    # Nine tokens are more than a bucket has.
    both((0, 1), (8, 1), runs=0)
    both((2, 3, 1), (2, 3, 1))
    for side in (captured, eager):
        side.runner.close()
    # Of pages that no plan names, one was written.
    (pool,) = captured.pools.pools
    assert not any(part[pool.padding_page].isnan().any() for part in pool._layers[0])


@pytest.mark.parametrize("sizes", [LATENT, WINDOWS], ids=["latents", "windows"])
def test_latents_and_windows_are_captured_with_drafts_too(sizes: Mapping[str, Any]) -> None:
    """With the kernels of a GPU that need not be the same in any batch, so to the last digits."""
    model = model_of(sizes, deterministic=False)
    config = replace(config_of(slots_max=2, pages=20), step_drafts_max=3)
    captured, eager = (
        Side.of(model, config, ((GREEDY, None),) * 2, captured=on) for on in (True, False)
    )
    assert isinstance(captured.runner._steps.recorded, CapturedSteps)
    last = 1
    steps = (((), ()), ((0, 1), (1, 2)), ((1,), (1,)), ((1, 0), (0, 3)), ((0,), (0,)))
    for slots, lengths in steps:
        drafts = {
            slot: [last, *range(1, length)][:length]
            for slot, length in zip(slots, lengths, strict=True)
        }
        prompts = () if slots else (0, 1)
        plan, wanted = eager.step(slots, drafts, prompts)
        _, found = captured.step(slots, drafts, prompts)
        same(found, wanted, Samples.of(plan).counting(wanted.tokens))
        last = int(wanted.tokens[0])
        for ours, theirs in zip(captured.kv(), eager.kv(), strict=True):
            pair = ours.view(torch.float32), theirs.view(torch.float32)
            assert torch.allclose(*pair, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert captured.capture.runs == 4
    for side in (captured, eager):
        side.runner.close()


def test_a_model_that_ranks_share_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    shared = cast("Model", SimpleNamespace(ranks=2))
    with caplog.at_level(logging.WARNING):
        found = record_steps(
            shared,
            cast("KVPools", None),
            config_of(),
            tables=(),
            last_token_X=torch.zeros(2, dtype=torch.int64),
            capture=Calls(),
        )
    assert found is None
    assert "shared by 2 ranks" in caplog.text
