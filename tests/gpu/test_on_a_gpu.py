"""What only a GPU can show: CUDA graphs, and kernels that are not interpreted.

`make gpu-check` runs these; elsewhere they are skipped.
"""

import numpy as np
import pytest
import torch

from tests.unit.execution.tiny import GREEDY, Planner, Request, bind, config_of
from tokenspeed.cache import KVPools
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


def run_steps(
    *, captured: bool, overlap_depth: int, params: SamplingParams = GREEDY
) -> tuple[list[list[int]], bool]:
    """Greedy tokens of each step, and whether steps were captured."""
    config = config_of(
        pages=80, page_size=32, slots_max=6, context_max=512, overlap_depth=overlap_depth
    )
    kernels = KernelSelector(device=CUDA, dtype=torch.bfloat16)
    model = build_model(
        ModelConfig.from_hf(SIZES), dtype=torch.bfloat16, device=CUDA, kernels=kernels
    )
    generator = torch.Generator(CUDA).manual_seed(1)
    for _, weight in model.weights():
        weight.data.normal_(std=0.3, generator=generator)
    pools = KVPools(model.kv_specs(), pages=80, page_size=32, device=CUDA, padded=True)
    runner = Runner(model, pools, config, device=CUDA, threads=1)
    if captured:
        runner.warm_up()
    planner = Planner(config)
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


def test_the_registry_gives_a_gpu_tritons_kernels() -> None:
    kernels = KernelSelector(device=CUDA, dtype=torch.bfloat16)
    explained = kernels.explain("attention.paged_mha", traits={"head_dim": 128})
    assert explained.winner is not None, str(explained)
    assert explained.winner.solution == "triton", str(explained)
