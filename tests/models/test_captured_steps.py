"""Captured steps, with calls in place of CUDA graphs and Triton's kernels interpreted: the same
tokens as without, whatever rows come together."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from tests.kernels.triton_cases import GPU, interpreting
from tests.support.triton_interpreter import needs_interpreter
from tests.unit.execution.tiny import (
    CPU,
    GREEDY,
    SIZES,
    Planner,
    Request,
    bind,
    config_of,
    runner_of,
    tiny_model,
)
from tokenspeed.cache import KVPools
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import StepPlan
from tokenspeed.execution import Runner
from tokenspeed.execution.captured import CapturedSteps
from tokenspeed.execution.launched import AwaitedTokens
from tokenspeed.execution.sampler import Sampler
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling import Model, ModelConfig, build_model

pytestmark = needs_interpreter
__all__ = ["interpreting"]

CONFIG = config_of(slots_max=5)


class Calls:
    """In place of CUDA graphs: what is recorded is called again."""

    def __init__(self) -> None:
        self.runs = 0

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        launch()

        def again() -> None:
            self.runs += 1
            launch()

        return again


def gpu_model(overrides: dict[str, str] | None = None) -> Model:
    """`tiny_model`, of the kernels that a GPU gets."""
    kernels = KernelSelector(device=CPU, dtype=torch.float32, platform=GPU, overrides=overrides)
    model = build_model(
        ModelConfig.from_hf(SIZES), dtype=torch.float32, device=CPU, kernels=kernels
    )
    for (_, ours), (_, theirs) in zip(model.weights(), tiny_model().weights(), strict=True):
        ours.data.copy_(theirs.data)
    return model


def gpu_runner(capture: Calls, overrides: dict[str, str] | None = None) -> Runner:
    model = gpu_model(overrides)
    pools = KVPools(model.kv_specs(), pages=32, page_size=CONFIG.page_size, device=CPU, padded=True)
    for pool in pools.pools:
        for layer in range(SIZES["num_hidden_layers"]):
            for part in pool.layer(layer):
                part.fill_(torch.nan)
    return Runner(model, pools, CONFIG, device=CPU, threads=1, capture=capture)


def tokens_of(runner: Runner, params: Sequence[SamplingParams] = (GREEDY,) * 4) -> list[list[int]]:
    """Requests that come and go: one to four rows at once, prompts beside them."""
    planner = Planner(CONFIG)
    requests = [
        Request(
            slot=slot, prompt=np.random.default_rng(slot).integers(0, 61, 3 + 2 * slot).tolist()
        )
        for slot in range(4)
    ]
    found: list[list[int]] = []

    def run(decodes: list[Request], prefills: list[tuple[Request, int]]) -> None:
        plan = planner.plan(decodes, prefills)
        found.append(runner.launch(plan).result().tokens.tolist())

    for request in requests:
        bind(runner, request, params[request.slot], seed=request.slot)
    run([], [(requests[0], 3)])
    run([requests[0]], [])
    run([requests[0]], [(requests[1], 5), (requests[2], 7)])
    run(requests[:3], [])
    run(requests[:3], [(requests[3], 9)])
    run(requests, [])
    run([requests[3], requests[1]], [])
    # The row that fills up chooses for nobody, whoever was there before.
    run(requests[:3], [])
    run(requests, [])
    runner.close()
    return found


def test_captured_steps_choose_the_tokens_of_others() -> None:
    capture = Calls()
    runner = gpu_runner(capture)
    runner.warm_up()
    assert isinstance(runner._steps.recorded, CapturedSteps)
    capture.runs = 0
    assert tokens_of(runner) == tokens_of(runner_of(CONFIG))
    # Steps of decode rows alone.
    assert capture.runs == 6


DRAWN = SamplingParams(temperature=0.8, top_k=20)
MIXED = (
    DRAWN,
    GREEDY,
    SamplingParams(temperature=1.3, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=0.5),
)


def test_draws_are_part_of_captured_steps_for_rows_of_any_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []
    draw = CapturedSteps.draw

    def noted(steps: CapturedSteps, plan: StepPlan, sampler: Sampler) -> AwaitedTokens | None:
        awaited = draw(steps, plan, sampler)
        drawn.extend([len(plan.row_slots)] * (awaited is not None))
        return awaited

    monkeypatch.setattr(CapturedSteps, "draw", noted)
    for params in ((DRAWN,) * 4, MIXED):
        capture = Calls()
        runner = gpu_runner(capture)
        runner.warm_up()
        capture.runs = 0
        drawn.clear()
        assert tokens_of(runner, params) == tokens_of(runner_of(CONFIG), params)
        assert capture.runs == 6
        assert len(drawn) == 6


def test_rows_that_want_more_than_a_draw_are_sampled_from_a_captured_steps_logits() -> None:
    capture = Calls()
    runner = gpu_runner(capture)
    runner.warm_up()
    params = (DRAWN, SamplingParams(temperature=0.8, logit_bias={5: 3.0}), DRAWN, GREEDY)
    assert tokens_of(runner, params) == tokens_of(runner_of(CONFIG), params)


def test_kernels_that_go_through_rows_on_the_host_are_not_captured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = gpu_runner(Calls(), {"attention.paged_mha": "reference"})
    runner.warm_up()
    assert runner._steps.recorded is None
    assert "steps run through Python: a kernel that goes through rows on the host" in caplog.text
    runner.close()
