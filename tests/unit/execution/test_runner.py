"""The runner against a model's forward driven by hand."""

import json
import threading

import numpy as np
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
from tokenspeed.core.errors import ConfigError, InvalidParameter, RequestError
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import resolve_dtype, set_threads
from tokenspeed.execution.platform import one_thread
from tokenspeed.kernels import Platform

PROMPTS = ([1, 2, 3, 4, 5, 6, 7], [40, 30, 20], [9] * 11)


def tokens_of(steps, plans_rows) -> dict[int, list[int]]:
    """Tokens by slot, of launched steps and the slots that each sampled."""
    out: dict[int, list[int]] = {}
    for step, slots in zip(steps, plans_rows, strict=True):
        for slot, token in zip(slots, step.result().tokens.tolist(), strict=True):
            out.setdefault(slot, []).append(token)
    return out


def run_three(overlap_depth: int, params: SamplingParams) -> dict[int, list[int]]:
    """Three requests that join one after the other; chunks and decode rows share steps."""
    config = config_of(overlap_depth=overlap_depth)
    runner, planner = runner_of(config), Planner(config)
    a, b, c = (Request(slot=slot, prompt=list(PROMPTS[i])) for i, slot in enumerate((3, 0, 6)))
    launched, sampled = [], []

    def launch(decodes, prefills):
        for request, _ in prefills:
            if request.length == 0:
                bind(runner, request, params, seed=request.slot)
        plan = planner.plan(decodes, prefills)
        launched.append(runner.launch(plan))
        sampled.append(plan.row_slots[plan.sample_rows].tolist())

    launch([], [(a, 4)])
    launch([], [(a, 3), (b, 3)])
    launch([a, b], [(c, 6)])
    launch([b, a], [(c, 5)])
    for _ in range(8):
        launch([a, b, c], [])
    tokens = tokens_of(launched, sampled)
    runner.close()
    return tokens


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_decode_rows_take_the_last_token_of_their_slot(overlap_depth):
    tokens = run_three(overlap_depth, GREEDY)
    driver = Driver(tiny_model())
    for prompt, slot in zip(PROMPTS, (3, 0, 6), strict=True):
        assert tokens[slot] == driver.greedy(prompt, len(tokens[slot])), slot


def test_overlap_changes_no_token_of_a_draw():
    params = SamplingParams(temperature=1.0, top_p=0.9, frequency_penalty=0.3)
    one, other = run_three(0, params), run_three(1, params)
    assert one == other
    assert one != run_three(0, GREEDY)


def test_a_table_entry_written_twice_keeps_the_later_page():
    config = config_of()
    runner, planner = runner_of(config), Planner(config)
    request = Request(slot=1, prompt=list(PROMPTS[0]))
    bind(runner, request, GREEDY)
    plan = planner.plan([], [(request, 7)])
    group = plan.groups[0]
    # Stale entries come first, as they do when a slot changes hands between two plans.
    twice = type(group)(
        kv_slots=group.kv_slots,
        table_slots=np.concatenate([group.table_slots, group.table_slots]),
        table_indices=np.concatenate([group.table_indices, group.table_indices]),
        table_pages=np.concatenate([group.table_pages * 0, group.table_pages]),
    )
    fields = {name: getattr(plan, name) for name in plan.__slots__}
    first = runner.launch(type(plan)(**{**fields, "groups": (twice,)})).result()
    second = runner.launch(planner.plan([request])).result()
    expected = Driver(tiny_model()).greedy(PROMPTS[0], 2)
    assert [int(first.tokens[0]), int(second.tokens[0])] == expected


def test_a_slot_is_bound_with_the_launch_and_not_before():
    # The step under way still belongs to the slot's last owner.
    config = config_of(overlap_depth=1)
    model = tiny_model()
    gate = threading.Event()
    forward = model.forward

    def waiting(batch, kv):
        assert gate.wait(30)
        return forward(batch, kv)

    model.forward = waiting
    runner, planner = runner_of(config, model), Planner(config)
    old = Request(slot=2, prompt=list(PROMPTS[0]))
    bind(runner, old, GREEDY)
    before = runner.launch(planner.plan([], [(old, 7)]))
    new = Request(slot=2, prompt=list(PROMPTS[1]))
    bind(runner, new, SamplingParams(temperature=0.0, logit_bias={60: 100.0}))
    after = runner.launch(planner.plan([], [(new, 3)]))
    gate.set()
    driver = Driver(tiny_model())
    assert before.result().tokens.tolist() == driver.greedy(PROMPTS[0], 1)
    assert after.result().tokens.tolist() == [60]
    runner.close()


def test_a_step_that_samples_nothing_gives_no_token():
    config = config_of()
    runner, planner = runner_of(config), Planner(config)
    request = Request(slot=0, prompt=list(PROMPTS[2]))
    bind(runner, request, GREEDY)
    result = runner.launch(planner.plan([], [(request, 5)])).result()
    assert result.tokens.dtype == np.int32
    assert len(result.tokens) == 0
    assert result.logprobs is None


def test_logprobs_come_with_the_rows_that_asked():
    config = config_of()
    runner, planner = runner_of(config), Planner(config)
    quiet, loud = (Request(slot=i, prompt=list(PROMPTS[i])) for i in (0, 1))
    bind(runner, quiet, GREEDY)
    bind(runner, loud, SamplingParams(temperature=0.0, logprobs=2))
    result = runner.launch(planner.plan([], [(quiet, 7), (loud, 3)])).result()
    assert result.logprobs.sample_indices.tolist() == [1]
    driver = Driver(tiny_model())
    expected = driver.prefill(PROMPTS[1], chunk=99)[-1].log_softmax(-1)
    assert result.logprobs.chosen[0] == pytest.approx(expected.max().item(), rel=1e-4)
    assert result.logprobs.top_token_ids[0, 0] == result.tokens[1]


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_what_the_forward_raises_surfaces_in_the_result(overlap_depth):
    config = config_of(overlap_depth=overlap_depth)
    model = tiny_model()

    def failing(batch, kv):
        raise ArithmeticError("the matrix is upside down")

    model.forward = failing
    runner, planner = runner_of(config, model), Planner(config)
    request = Request(slot=0, prompt=[1])
    bind(runner, request, GREEDY)
    launched = runner.launch(planner.plan([], [(request, 1)]))
    with pytest.raises(ArithmeticError, match="upside down"):
        launched.result()
    runner.close()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"page_size": 1, "pages": 4},
        {"context_max": 1, "pages": 1},
        {"slots_max": 1, "step_tokens_max": 1},
        {"overlap_depth": 1},
    ],
    ids=str,
)
def test_warming_up_leaves_no_trace_in_later_tokens(sizes):
    config = config_of(**sizes)
    prompt = [5]
    tokens = []
    for warm in (False, True):
        runner, planner = runner_of(config), Planner(config)
        if warm:
            runner.warm_up()
        request = Request(slot=0, prompt=prompt)
        bind(runner, request, GREEDY)
        tokens.append(runner.launch(planner.plan([], [(request, 1)])).result().tokens.tolist())
        runner.close()
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_closing_ends_the_thread(overlap_depth):
    before = set(threading.enumerate())
    runner = runner_of(config_of(overlap_depth=overlap_depth))
    runner.warm_up()
    assert len(set(threading.enumerate()) - before) == overlap_depth
    runner.close()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_a_profile_is_a_trace_of_the_forwards_asked_for(overlap_depth, tmp_path):
    runner = runner_of(config_of(overlap_depth=overlap_depth))
    path = runner.start_profile(tmp_path / "deep" / "down", 1)
    assert path.parent == tmp_path / "deep" / "down"
    assert not path.exists()
    runner.warm_up()
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::mm" in names or "aten::addmm" in names or "aten::linear" in names
    assert runner.stop_profile() == path
    runner.close()


def test_a_profile_without_an_end_is_written_when_stopped_or_closed(tmp_path):
    runner = runner_of(config_of())
    path = runner.start_profile(tmp_path, None)
    runner.warm_up()
    assert not path.exists()
    assert runner.stop_profile() == path
    assert path.stat().st_size > 0
    other = runner.start_profile(tmp_path, 5)
    assert other != path
    runner.close()
    assert other.exists()


def test_profiles_are_refused_with_a_reason(tmp_path):
    runner = runner_of(config_of())
    with pytest.raises(RequestError, match="no profile was started"):
        runner.stop_profile()
    with pytest.raises(InvalidParameter, match="at least one step"):
        runner.start_profile(tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidParameter, match="no directory can be made"):
        runner.start_profile(tmp_path / "file" / "below", 1)
    path = runner.start_profile(tmp_path, 1)
    with pytest.raises(RequestError, match="being recorded to"):
        runner.start_profile(tmp_path, 1)
    runner.close()
    assert path.exists()


def test_the_dtype_follows_what_the_cpu_multiplies(monkeypatch):
    for features, expected in (
        ({"avx2", "avx512f"}, torch.float32),
        ({"avx512f", "avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16),
    ):
        platform = Platform(device="cpu", features=frozenset(features))
        monkeypatch.setattr(Platform, "of", staticmethod(lambda _, found=platform: found))
        assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float32", CPU) == torch.float32
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match=r"--dtype must be auto, float32 or bfloat16"):
        resolve_dtype("int3", CPU)


def test_one_thread_is_a_loan():
    set_threads(2)
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2


def test_threads_are_what_was_asked_for_or_all_the_process_may_use():
    assert set_threads(2) == torch.get_num_threads() == 2
    assert set_threads(None) == torch.get_num_threads() >= 1


def test_positions_of_a_mixed_batch_follow_each_row():
    config = config_of()
    model = tiny_model()
    seen = []
    forward = model.forward

    def recording(batch, kv):
        seen.append((batch.positions_T.tolist(), batch.sample_token_indices_S.tolist()))
        return forward(batch, kv)

    model.forward = recording
    runner, planner = runner_of(config, model), Planner(config)
    a, b = Request(slot=0, prompt=list(PROMPTS[0])), Request(slot=1, prompt=list(PROMPTS[2]))
    for request in (a, b):
        bind(runner, request, GREEDY)
    runner.launch(planner.plan([], [(a, 7), (b, 2)])).result()
    runner.launch(planner.plan([a], [(b, 9)])).result()
    assert seen == [
        ([0, 1, 2, 3, 4, 5, 6, 0, 1], [6]),
        ([7, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 9]),
    ]
