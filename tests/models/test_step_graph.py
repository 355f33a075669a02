"""Recorded steps give the tokens of a forward that goes through Python."""

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
from tokenspeed.core.errors import KernelError
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import Runner
from tokenspeed.execution.graph import StepGraph
from tokenspeed.kernels import PACKED, QUANTISED_ROWS, KernelSelector, ops
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.modeling import ForwardBatch, Model, ModelConfig, build_model

PROMPTS = ([400, 30, 5000, 77, 6], [9000, 12, 13], [*range(500, 545)])


def packed_model(overrides: dict[str, str] | None = None) -> Model:
    checkpoint = loader.open_checkpoint(loader.resolve("smollm2-135m"))
    kernels = KernelSelector(
        device=CPU,
        dtype=torch.bfloat16,
        overrides=overrides,
        weight_formats=(PACKED, "bfloat16"),
        activation_formats=(QUANTISED_ROWS,),
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


def record(model: Model, config: SchedulerConfig) -> StepGraph | None:
    (group,) = config.groups
    pools = KVPools(model.kv_specs(), pages=group.pages, page_size=config.page_size, device=CPU)
    return StepGraph.record(
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
    """Three requests that join one after the other, one of them in chunks beside decode rows."""
    planner = Planner(config)
    requests = [
        Request(slot=slot, prompt=list(prompt))
        for slot, prompt in zip((3, 0, 6), PROMPTS, strict=True)
    ]
    found: list[list[int]] = [[], [], []]

    def launch(decodes: list[Request], prefills: list[tuple[Request, int]]) -> None:
        for request, _ in prefills:
            if request.length == 0:
                bind(runner, request, params, seed=request.slot)
        plan = planner.plan(decodes, prefills)
        result = runner.launch(plan).result()
        rows = [*decodes, *(request for request, _ in prefills)]
        assert len(result.tokens) == len(plan.sample_rows)
        for row, token in zip(plan.sample_rows.tolist(), result.tokens.tolist(), strict=True):
            found[requests.index(rows[row])].append(token)

    a, b, c = requests
    launch([], [(a, 5)])
    for _ in range(14):
        launch([a], [])
    # A step that samples from one chunk and not from the other, one with no row to sample from.
    launch([a], [(b, 3), (c, 20)])
    launch([], [(c, 7)])
    launch([b, a], [(c, 18)])
    for _ in range(20):
        launch([c, a, b], [])
    runner.close()
    return found


def test_recorded_steps_give_the_tokens_of_the_forward(model: Model) -> None:
    config = config_of(page_size=16, context_max=128)
    driver = Driver(model)
    found = run(warm(config, model), config, GREEDY)
    assert [len(tokens) for tokens in found] == [37, 22, 21]
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        assert tokens == driver.greedy(prompt, len(tokens))


def test_logits_of_recorded_steps_can_be_sampled_from(model: Model) -> None:
    config = config_of(page_size=16, context_max=128)
    drawn = SamplingParams(temperature=1.0, top_p=0.9, frequency_penalty=0.3)
    found = run(warm(config, model), config, drawn)
    # A runner records when it is warmed up.
    assert found == run(runner_of(config, model), config, drawn)
    assert found != run(warm(config, model), config, GREEDY)


def test_no_python_of_the_model_runs_once_it_is_recorded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(page_size=16, context_max=128)
    runner = warm(config, model)

    def forward(*_: object) -> None:
        raise AssertionError("the model's forward was called")

    monkeypatch.setattr(model, "forward", forward)
    assert [len(tokens) for tokens in run(runner, config, GREEDY)] == [37, 22, 21]


def test_a_step_may_have_one_row_that_takes_all_its_tokens(model: Model) -> None:
    config = config_of(page_size=16, slots_max=1, step_tokens_max=1, context_max=128)
    graph = record(model, config)
    assert graph is not None
    planner, request = Planner(config), Request(slot=0, prompt=[1, 2, 3])
    found = [graph.run(planner.plan([], [(request, 1)]))[1].tolist() for _ in range(3)]
    found += [graph.run(planner.plan([request]))[1].tolist() for _ in range(3)]
    assert found[:2] == [[], []]
    assert [token for (token,) in found[2:]] == Driver(model).greedy([1, 2, 3], 4)


def test_a_step_larger_than_recorded_is_refused(model: Model) -> None:
    config = config_of(page_size=16, slots_max=2, step_tokens_max=8, context_max=128)
    graph = record(model, config)
    assert graph is not None
    planner, long = Planner(config), Request(slot=0, prompt=[1] * 9)
    with pytest.raises(
        KernelError, match=r"a step of 9 tokens, 1 rows.*; recorded were 8, 2 and 3"
    ):
        graph.run(planner.plan([], [(long, 9)]))
    requests = [Request(slot=slot, prompt=[1]) for slot in (0, 1, 0)]
    with pytest.raises(KernelError, match="a step of 3 tokens, 3 rows"):
        graph.run(Planner(config).plan([], [(request, 1) for request in requests]))


def test_a_token_beyond_the_vocabulary_is_refused(model: Model) -> None:
    config = config_of(page_size=16, context_max=128)
    graph = record(model, config)
    assert graph is not None
    size = model.config.vocab_size
    request = Request(slot=0, prompt=[1, size])
    with pytest.raises(KernelError, match=f"row {size} of a table of {size} rows"):
        graph.run(Planner(config).plan([], [(request, 2)]))


def test_a_forward_with_any_other_kernel_is_not_recorded(model: Model) -> None:
    config = config_of(page_size=16, context_max=128)
    assert record(model, config) is not None
    assert record(tiny_model(), config_of()) is None
    other = packed_model({"rope.rotate": "reference"})
    before = Driver(other).greedy([1, 2, 3], 4)
    assert record(other, config) is None
    # What failed leaves nothing behind: kernels run again.
    assert Driver(other).greedy([1, 2, 3], 4) == before


def test_a_forward_with_a_kernel_on_other_rows_is_not_recorded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(page_size=16, context_max=128)
    logits_SV = torch.zeros(2, 8)
    argmax = model.kernels.select(ops.sampling.argmax, format_name="float32")
    forward = model.forward

    def with_more(batch: ForwardBatch, pools: KVPools) -> torch.Tensor:
        argmax(logits_SV)
        return forward(batch, pools)

    monkeypatch.setattr(model, "forward", with_more)
    assert record(model, config) is None
