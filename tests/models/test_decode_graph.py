"""Recorded decode steps give the tokens of a forward that goes through Python."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.forward import Driver
from tests.unit.execution.tiny import (
    CPU,
    GREEDY,
    Planner,
    Request,
    bind,
    config_of,
    runner_of,
    tiny_model,
)
from tokenspeed import loader
from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import Runner
from tokenspeed.execution.graph import DecodeGraph
from tokenspeed.kernels import PACKED, KernelSelector
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.modeling import Model, ModelConfig, build_model

PROMPTS = ([400, 30, 5000, 77, 6], [9000, 12, 13], [*range(500, 545)])


def packed_model(overrides: dict[str, str] | None = None) -> Model:
    checkpoint = loader.open_checkpoint(loader.resolve("smollm2-135m"))
    kernels = KernelSelector(
        device=CPU,
        dtype=torch.bfloat16,
        overrides=overrides,
        weight_formats=(PACKED, "bfloat16"),
        kv_formats=("interleaved_bfloat16", "bfloat16"),
        runtime=start_runtime(threads=2),
    )
    model = build_model(
        ModelConfig.from_hf(checkpoint.hf_config),
        dtype=torch.bfloat16,
        device=CPU,
        kernels=kernels,
    )
    model.load_weights(checkpoint.blocks())
    return model


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    yield packed_model()


def record(model: Model, config: SchedulerConfig) -> DecodeGraph | None:
    (group,) = config.groups
    pools = KVPools(model.kv_specs(), pages=group.pages, page_size=config.page_size, device=CPU)
    return DecodeGraph.record(
        model,
        pools,
        config,
        tables=[torch.zeros(config.slots_max, 4, dtype=torch.int32)],
        last_token_X=torch.zeros(config.slots_max, dtype=torch.int64),
    )


def warm(config: SchedulerConfig, model: Model) -> Runner:
    runner = runner_of(config, model)
    runner.warm_up()
    return runner


def run(runner: Runner, config: SchedulerConfig, params: SamplingParams) -> list[list[int]]:
    """Three requests that join one after the other, and decode over some pages."""
    planner = Planner(config)
    requests = [
        Request(slot=slot, prompt=list(prompt))
        for slot, prompt in zip((3, 0, 6), PROMPTS, strict=True)
    ]
    found: list[list[int]] = [[], [], []]

    def launch(decodes: list[Request], prefills: list[tuple[Request, int]]) -> None:
        for request, _ in prefills:
            bind(runner, request, params, seed=request.slot)
        result = runner.launch(planner.plan(decodes, prefills)).result()
        rows = [*decodes, *(request for request, _ in prefills)]
        for request, token in zip(rows, result.tokens.tolist(), strict=True):
            found[requests.index(request)].append(token)

    a, b, c = requests
    launch([], [(a, 5)])
    for _ in range(14):
        launch([a], [])
    launch([a], [(b, 3), (c, 45)])
    for _ in range(20):
        launch([c, a, b], [])
    runner.close()
    return found


def test_recorded_steps_give_the_tokens_of_the_forward(model: Model) -> None:
    config = config_of(page_size=16, context_max=128)
    driver = Driver(model)
    found = run(warm(config, model), config, GREEDY)
    assert [len(tokens) for tokens in found] == [36, 21, 21]
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        assert tokens == driver.greedy(prompt, len(tokens))


def test_logits_of_recorded_steps_can_be_sampled_from(model: Model) -> None:
    config = config_of(page_size=16, context_max=128)
    drawn = SamplingParams(temperature=1.0, top_p=0.9, frequency_penalty=0.3)
    found = run(warm(config, model), config, drawn)
    # A runner records when it is warmed up.
    assert found == run(runner_of(config, model), config, drawn)
    assert found != run(warm(config, model), config, GREEDY)


def test_only_steps_of_sampled_decode_rows_fit(model: Model) -> None:
    config = config_of(page_size=16, slots_max=2, context_max=128)
    graph = record(model, config)
    assert graph is not None and graph.rows_max == 2
    planner = Planner(config)
    requests = [Request(slot=slot, prompt=[1, 2, 3]) for slot in (0, 1, 0)]
    a, b, _ = requests
    assert not graph.fits(planner.plan([], [(a, 3), (b, 2)]))
    assert not graph.fits(planner.plan([a], [(b, 1)]))
    assert graph.fits(planner.plan([a]))
    assert graph.fits(planner.plan([a, b]))
    assert not graph.fits(planner.plan(requests))


def test_a_forward_with_any_other_kernel_is_not_recorded(model: Model) -> None:
    config = config_of(page_size=16, context_max=128)
    assert record(model, config) is not None
    assert record(packed_model({"rope.rotate": "reference"}), config) is None
    assert record(tiny_model(), config_of()) is None
    # What failed leaves nothing behind: kernels run again.
    assert Driver(model).greedy([1, 2, 3], 2)
