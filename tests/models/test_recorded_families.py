"""Families whose steps are recorded: what they compute beside products is native too."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models.tiny import build, read_tensors, write_tiny
from tests.unit.execution.tiny import CPU, GREEDY, Planner, Request, bind, config_of
from tokenspeed.cache import KVPools
from tokenspeed.execution import Runner
from tokenspeed.execution.graph import StepGraph
from tokenspeed.modeling import Model

PROMPTS = ([40, 30, 150, 77, 6], [90, 12, 13], [*range(50, 80)])


def loaded(name: str, path: Path) -> Model:
    write_tiny(name, path)
    model = build(json.loads((path / "config.json").read_text()), native_formats=True)
    model.load_weights(read_tensors(path).items())
    return model


def tokens_of(model: Model, *, recorded: bool) -> list[list[int]]:
    """What three requests get, one of which comes in chunks beside decode rows."""
    config = config_of(page_size=16, context_max=128)
    groups = config.groups * len(model.kv_specs())
    config = replace(config, groups=groups)
    pools = KVPools(model.kv_specs(), pages=groups[0].pages, page_size=16, device=CPU)
    runner = Runner(model, pools, config, device=CPU, threads=1)
    if recorded:
        runner.warm_up()
        assert runner._steps.recorded is not None
    planner = Planner(config)
    a, b, c = (
        Request(slot=slot, prompt=list(prompt))
        for slot, prompt in zip((3, 0, 6), PROMPTS, strict=True)
    )
    for request in (a, b, c):
        bind(runner, request, GREEDY)
    found: list[list[int]] = []

    def launch(decodes: list[Request], prefills: list[tuple[Request, int]]) -> None:
        found.append(runner.launch(planner.plan(decodes, prefills)).result().tokens.tolist())

    launch([], [(a, 5)])
    for _ in range(9):
        launch([a], [])
    launch([a], [(b, 3), (c, 20)])
    launch([a, b], [(c, 10)])
    for _ in range(9):
        launch([c, a, b], [])
    runner.close()
    return found


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "llama-yarn",
        "qwen3-moe",
        "glm4-moe",
        "gpt-oss",
        "mistral-window",
        "deepseek-v2",
        "deepseek-v3",
    ],
)
def test_recorded_steps_of_a_family_give_the_tokens_of_its_forward(
    name: str, tmp_path: Path
) -> None:
    model = loaded(name, tmp_path)
    assert tokens_of(model, recorded=True) == tokens_of(model, recorded=False)


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_recorded_latents_give_the_bits_of_the_forward(name: str, tmp_path: Path) -> None:
    model = loaded(name, tmp_path)
    config = config_of(page_size=16, context_max=128)
    pools = KVPools(model.kv_specs(), pages=config.groups[0].pages, page_size=16, device=CPU)
    runner = Runner(model, pools, config, device=CPU, threads=1)
    runner.warm_up()
    steps = runner._steps
    assert isinstance(steps.recorded, StepGraph)
    planner = Planner(config)
    requests = [Request(slot=slot, prompt=[*range(9 * slot, 40)]) for slot in (0, 2)]
    for request in requests:
        bind(runner, request, GREEDY)
    for decodes, prefills in (
        ([], [(requests[0], 40)]),
        ([requests[0]], [(requests[1], 22)]),
        (requests, []),
    ):
        plan = planner.plan(decodes, prefills)
        # A recorded step leaves the tokens that it chose for the next one.
        with torch.inference_mode():
            logits_SV = steps.logits(plan).clone()
        recorded_SV, _ = steps.recorded.run(plan, likeliest=True)
        assert torch.equal(recorded_SV, logits_SV)
    runner.close()


def test_a_model_with_a_sum_of_pytorchs_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("qwen3-moe", tmp_path)
    forward = model.embedding.forward  # type: ignore[attr-defined]
    monkeypatch.setattr(model.embedding, "forward", lambda ids_T: forward(ids_T) * 2.0)  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        tokens_of(model, recorded=True)


def test_logits_of_native_experts_are_those_of_transformers(tmp_path: Path) -> None:
    from tests.models.test_tiny_models import assert_close, expected, prompt
    from tests.support.forward import Driver

    for name in ("qwen3-moe", "glm4-moe", "gpt-oss"):
        folder = tmp_path / name
        tiny = write_tiny(name, folder)
        model = build(json.loads((folder / "config.json").read_text()), native_formats=True)
        model.load_weights(read_tensors(folder).items())
        tokens = prompt(40, seed=2)
        with torch.inference_mode():
            assert_close(Driver(model).prefill(tokens, chunk=16), expected(tiny, tokens))
