"""Latent attention end to end: latents in pages of their own kind, found again by later requests,
and bits that do not depend on how a prompt was cut."""

import json
from pathlib import Path

import pytest
import torch

from tests.models.test_tiny_models import prompt
from tests.models.tiny import build, read_tensors, write_tiny
from tests.support.forward import Driver
from tests.unit.execution.test_with_control import generate_with
from tokenspeed.cache import KVPools
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, CacheGroupKind, SchedulerConfig
from tokenspeed.core.errors import ConfigError
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import Runner
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling import ModelConfig, build_model

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_text_over_latents_that_others_left_equals_that_of_transformers(
    tmp_path: Path, name: str
) -> None:
    tiny = write_tiny(name, tmp_path)
    model = build(json.loads((tmp_path / "config.json").read_text()))
    model.load_weights(read_tensors(tmp_path).items())
    (spec,) = model.kv_specs()
    assert spec.kind is CacheGroupKind.LATENT
    # 32 elements of compressed KV and 16 of the key, once for all heads, in three layers.
    assert (spec.layers, spec.token_size_bytes) == (3, 3 * 48 * 4)
    config = SchedulerConfig(
        groups=(CacheGroup(kind=spec.kind, pages=40),),
        page_size=4,
        slots_max=2,
        step_tokens_max=12,
        context_max=96,
    )
    pools = KVPools((spec,), pages=40, page_size=4, device=CPU)
    for layer in range(spec.layers):
        # Whatever is read before a request wrote it shows.
        pools.latents(0, layer).fill_(float("nan"))
    runner, control = Runner(model, pools, config, device=CPU, threads=1), Scheduler(config)
    shared = prompt(30, seed=1)
    prompts = [shared + prompt(9, seed=seed) for seed in (2, 3, 4)]
    # One alone leaves its latents behind; the others begin with some of them.
    found = generate_with(runner, control, config, [(prompts[0], GREEDY)])
    assert control.stats().cached_tokens == 0
    found += generate_with(runner, control, config, [(text, GREEDY) for text in prompts[1:]])
    assert control.stats().cached_tokens == 2 * 28
    runner.close()
    for text, tokens in zip(prompts, found, strict=True):
        with torch.inference_mode():
            logits = tiny.theirs(torch.tensor([text + tokens])).logits[0]
        assert tokens == logits[len(text) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_how_a_prompt_was_cut(tmp_path: Path, dtype: torch.dtype) -> None:
    write_tiny("deepseek-v3", tmp_path)
    hf_config = json.loads((tmp_path / "config.json").read_text())
    model = build(hf_config, dtype=dtype, native_formats=True)
    model.load_weights(read_tensors(tmp_path).items())
    tokens = prompt(41, seed=5)
    driver = Driver(model)
    whole = driver.prefill(tokens, chunk=41)
    for chunk in (1, 7, 16):
        assert torch.equal(driver.prefill(tokens, chunk=chunk), whole)


def test_latents_are_not_rounded(tmp_path: Path) -> None:
    write_tiny("deepseek-v3", tmp_path)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    kernels = KernelSelector(device=CPU, dtype=torch.float32, kv_formats=("interleaved_int8",))
    with pytest.raises(ConfigError, match="--kv-dtype auto"):
        build_model(config, dtype=torch.float32, device=CPU, kernels=kernels)
