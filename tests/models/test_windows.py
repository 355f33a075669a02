"""Layers that see a window give their pages back, and the text is that of `transformers`."""

import json
from pathlib import Path

import pytest
import torch

from tests.models.tiny import build, read_tensors, write_tiny
from tests.unit.execution.test_with_control import generate_with
from tokenspeed.cache import KVPools
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, CacheGroupKind, SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import Runner

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=30, ignore_eos=True)


@pytest.mark.parametrize("name", ["gemma3", "mistral-window", "gpt-oss"])
def test_text_over_pages_that_come_back_equals_that_of_transformers(
    tmp_path: Path, name: str
) -> None:
    tiny = write_tiny(name, tmp_path)
    model = build(json.loads((tmp_path / "config.json").read_text()))
    model.load_weights(read_tensors(tmp_path).items())
    specs = model.kv_specs()
    assert [spec.window for spec in specs] == ([7] if name == "mistral-window" else [None, 9])
    # Two requests of 70 tokens need 18 pages each; those of a window come back and go around.
    full, window = CacheGroupKind.FULL, CacheGroupKind.WINDOW
    config = SchedulerConfig(
        groups=tuple(
            CacheGroup(kind=full, pages=40)
            if spec.window is None
            else CacheGroup(kind=window, pages=14, window=spec.window)
            for spec in specs
        ),
        page_size=4,
        slots_max=2,
        step_tokens_max=12,
        context_max=96,
    )
    pools = KVPools(specs, pages=40, page_size=4, device=CPU)
    for group, spec in enumerate(specs):
        for layer in range(spec.layers):
            for pool in pools.layer(group, layer):
                # Whatever is read before this request wrote it shows.
                pool.fill_(float("nan"))
    runner = Runner(model, pools, config, device=CPU, threads=1)
    prompts = [list(range(start, start + 40)) for start in (5, 90)]
    found = generate_with(
        runner, Scheduler(config), config, [(prompt, GREEDY) for prompt in prompts]
    )
    runner.close()
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.inference_mode():
            logits = tiny.theirs(torch.tensor([prompt + tokens])).logits[0]
        assert tokens == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
