"""What only a GPU can show: CUDA graphs, and kernels that are not interpreted.

`make gpu-check` runs these; elsewhere they are skipped.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.execution.tiny import GREEDY, Planner, Request, bind, config_of
from tokenspeed.cache import KVPools
from tokenspeed.core.samples import Samples
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import Runner
from tokenspeed.execution.captured import CapturedSteps
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling import ModelConfig, build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

CUDA = torch.device("cuda")
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def runner_of(
    *, captured: bool, overlap_depth: int, drafts_max: int = 0, deterministic: bool = False
) -> tuple[Runner, Planner]:
    """A runner over KV of which nothing is a number yet, and what plans for it."""
    config = config_of(
        pages=80, page_size=32, slots_max=6, context_max=512, overlap_depth=overlap_depth
    )
    config = replace(config, step_drafts_max=drafts_max)
    kernels = KernelSelector(device=CUDA, dtype=torch.bfloat16, deterministic=deterministic)
    model = build_model(
        ModelConfig.from_hf(SIZES), dtype=torch.bfloat16, device=CUDA, kernels=kernels
    )
    generator = torch.Generator(CUDA).manual_seed(1)
    for _, weight in model.weights():
        weight.data.normal_(std=0.3, generator=generator)
    pools = KVPools(model.kv_specs(), pages=80, page_size=32, device=CUDA, padded=True)
    for layer in range(SIZES["num_hidden_layers"]):
        for part in pools.layer(0, layer):
            part.fill_(torch.nan)
    runner = Runner(model, pools, config, device=CUDA, threads=1)
    if captured:
        runner.warm_up()
    return runner, Planner(config)


def run_steps(
    *, captured: bool, overlap_depth: int, params: SamplingParams = GREEDY
) -> tuple[list[list[int]], bool]:
    """Greedy tokens of each step, and whether steps were captured."""
    runner, planner = runner_of(captured=captured, overlap_depth=overlap_depth)
    requests = [
        Request(slot=slot, prompt=np.random.default_rng(slot).integers(0, 4096, 40).tolist())
        for slot in range(5)
    ]
    for request in requests:
        bind(runner, request, params, seed=request.slot)
    plans = [planner.plan([], [(request, 12)]) for request in requests]
    plans += [planner.plan([], [(request, 28)]) for request in requests[:2]]
    plans += [planner.plan(requests[:2], [(request, 28)]) for request in requests[2:]]
    plans += [planner.plan(requests[: 1 + step % 5]) for step in range(20)]
    launched = [runner.launch(plan) for plan in plans]
    tokens = [step.result().tokens.tolist() for step in launched]
    was_captured = isinstance(runner._steps.recorded, CapturedSteps)
    runner.close()
    return tokens, was_captured


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.2, top_k=20, top_p=0.9)])
def test_captured_steps_choose_the_tokens_of_eager_ones(
    overlap_depth: int, params: SamplingParams
) -> None:
    wanted, captured = run_steps(captured=False, overlap_depth=0, params=params)
    assert not captured
    found, captured = run_steps(captured=True, overlap_depth=overlap_depth, params=params)
    assert captured
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    # Another shape of a product may turn a near-tie over, after which a text is another.
    assert same >= 0.8 * len(wanted), (found, wanted)


def run_drafts(
    texts: Sequence[Sequence[int]] | None, *, captured: bool, overlap_depth: int
) -> list[list[int]]:
    """The text of each request: token by token, or with drafts of given texts, every third of them
    wrong, of one to eight tokens a row in rows of any number."""
    runner, planner = runner_of(
        captured=captured, overlap_depth=overlap_depth, drafts_max=40, deterministic=True
    )
    graphs = runner._steps.recorded
    assert isinstance(graphs, CapturedSteps) == captured
    requests = [
        Request(slot=slot, prompt=np.random.default_rng(slot).integers(0, 4096, 40).tolist())
        for slot in range(5)
    ]
    found: list[list[int]] = []
    for request in requests:
        bind(runner, request, GREEDY, seed=request.slot)
        found.append(runner.launch(planner.plan([], [(request, 40)])).result().tokens.tolist())
    for step in range(16):
        rows = requests[: 1 + step % 5]
        drafts: dict[int, list[int]] = {}
        for row in rows if texts is not None else ():
            assert texts is not None
            done = len(found[row.slot])
            guesses = list(texts[row.slot][done : done + (step + 3 * row.slot) % 8])
            if len(guesses) > 2 and step % 3 == 0:
                guesses[2] = (guesses[2] + 1) % 4096
            drafts[row.slot] = guesses
        plan = planner.plan(rows, drafts=drafts)
        assert graphs is None or graphs.serves(plan)
        tokens = runner.launch(plan).result().tokens
        counting_S = Samples.of(plan).counting(tokens)
        for index, row in enumerate(rows):
            counting = tokens[counting_S & (plan.sample_rows == index)].tolist()
            found[row.slot] += counting
            planner.landed(row, drafts.get(row.slot, ()), len(counting))
    runner.close()
    return found


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_captured_rows_with_drafts_say_what_is_said_token_by_token(overlap_depth: int) -> None:
    wanted = run_drafts(None, captured=False, overlap_depth=0)
    for captured in (False, True):
        found = run_drafts(wanted, captured=captured, overlap_depth=overlap_depth)
        for ours, theirs in zip(found, wanted, strict=True):
            both = min(len(ours), len(theirs))
            assert ours[:both] == theirs[:both], captured
        assert sum(map(len, found)) > sum(map(len, wanted))


def test_the_registry_gives_a_gpu_tritons_kernels() -> None:
    kernels = KernelSelector(device=CUDA, dtype=torch.bfloat16)
    explained = kernels.explain("attention.paged_mha", traits={"head_dim": 128})
    assert explained.winner is not None, str(explained)
    assert explained.winner.solution == "triton", str(explained)
