"""Rows with drafts: their logits and tokens are those of decoding one by one, bit for bit."""

import json
import queue
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import Store

from tests.models.test_ranks import load
from tests.models.test_step_graph import packed_model
from tests.models.tiny import build, read_tensors, write_tiny
from tests.support.forward import Driver
from tests.support.ranks import in_threads
from tests.unit.execution.tiny import CPU, GREEDY, Planner, Request, bind, config_of
from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.step import StepPlan
from tokenspeed.distributed import Mesh
from tokenspeed.engine.rank_wire import Launch, ToFollower, decode_plan
from tokenspeed.engine.ranks import GroupRunner
from tokenspeed.execution import Runner
from tokenspeed.execution.graph import StepGraph
from tokenspeed.modeling import ForwardBatch, Model

PROMPTS = ([40, 30, 50, 77, 6], [90, 12, 13], [*range(45, 95)])
SLOTS = (3, 0, 6)
OUTPUT = 40
STEPS_WITH_CHUNKS = 4


@dataclass(frozen=True)
class Expected:
    """What a prompt goes on with, decoded one by one, and the logits of each token."""

    tokens: list[int]
    logits: torch.Tensor


def decode_one_by_one(model: Model, prompt: list[int]) -> Expected:
    driver = Driver(model)
    request, following = driver.request(), list(prompt)
    tokens, rows = [], []
    for _ in range(OUTPUT):
        logits_1V = driver.step([(request, following)])
        following = [int(logits_1V.argmax())]
        tokens += following
        rows.append(logits_1V.clone())
    return Expected(tokens, torch.cat(rows))


def guess(expected: Expected, done: int, dice: random.Random, vocabulary: int) -> list[int]:
    """A draft of up to 8 tokens, right as far as the dice say. The last expected token is left
    to be sampled."""
    right = expected.tokens[done : done + dice.randrange(9)][: OUTPUT - done - 1]
    wrong = [dice.randrange(vocabulary) for _ in range(dice.randrange(4))]
    following = done + len(right)
    if wrong and following < OUTPUT and wrong[0] == expected.tokens[following]:
        wrong[0] = (wrong[0] + 1) % vocabulary
    return (right + wrong)[:8]


def check_steps(
    run: Callable[[StepPlan], tuple[torch.Tensor | None, list[int]]],
    config: SchedulerConfig,
    expected: list[Expected],
    *,
    begin: Callable[[Request], None] = lambda _: None,
    vocabulary: int,
    seed: int,
) -> None:
    """Three requests that join one after the other, with drafts, beside chunks of each other."""
    dice = random.Random(seed)
    planner = Planner(config)
    requests = [
        Request(slot=slot, prompt=list(prompt)) for slot, prompt in zip(SLOTS, PROMPTS, strict=True)
    ]
    done = [0, 0, 0]
    accepted = drafted = 0
    joined = 0
    while min(done) < OUTPUT:
        decoding = [index for index in range(3) if 0 < done[index] < OUTPUT]
        dice.shuffle(decoding)
        prefills: list[tuple[Request, int]] = []
        if joined < 3 and not dice.randrange(3):
            request = requests[joined]
            begin(request) if request.length == 0 else None
            left = len(request.prompt) - request.length
            prefills.append((request, min(left, dice.randrange(1, 20))))
        if not decoding and not prefills:
            continue
        drafts = {
            SLOTS[index]: guess(expected[index], done[index], dice, vocabulary)
            for index in decoding
            if dice.randrange(4)
        }
        plan = planner.plan([requests[index] for index in decoding], prefills, drafts=drafts)
        logits_SV, tokens = run(plan)
        assert len(tokens) == len(plan.sample_rows)
        at = 0
        for index in decoding:
            draft = drafts.get(SLOTS[index], [])
            row = tokens[at : at + 1 + len(draft)]
            counting = 1
            while counting <= len(draft) and row[counting - 1] == draft[counting - 1]:
                counting += 1
            began = done[index]
            done[index] = ended = began + counting
            assert row[:counting] == expected[index].tokens[began:ended], f"seed {seed}"
            if logits_SV is not None:
                found = logits_SV[at : at + counting]
                assert torch.equal(found, expected[index].logits[began:ended]), f"seed {seed}"
            planner.landed(requests[index], draft, counting)
            at += len(row)
            drafted += len(draft)
            accepted += counting - 1
        if at < len(tokens):
            assert tokens[at] == expected[joined].tokens[0], f"seed {seed}"
            done[joined] = 1
            joined += 1
    # Some of each.
    assert accepted > 20
    assert drafted - accepted > 10


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Model]:
    yield packed_model()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Model]:
    def load(name: str, dtype: torch.dtype) -> Model:
        folder = tmp_path_factory.mktemp(name)
        write_tiny(name, folder)
        hf_config = json.loads((folder / "config.json").read_text())
        model = build(hf_config, dtype=dtype, native_formats=True)
        model.load_weights(read_tensors(folder).items())
        return model

    return cache(load)


def config_for(model: Model) -> SchedulerConfig:
    config = config_of(page_size=16, pages=64, context_max=128)
    groups = config.groups * len(model.kv_specs())
    return replace(config, groups=groups, step_drafts_max=24)


def pools_of(model: Model, config: SchedulerConfig) -> KVPools:
    return KVPools(model.kv_specs(), pages=64, page_size=config.page_size, device=CPU)


def check_recorded(model: Model) -> None:
    config = config_for(model)
    expected = [decode_one_by_one(model, list(prompt)) for prompt in PROMPTS]
    pools = pools_of(model, config)
    graph = StepGraph.record(
        model,
        pools,
        config,
        tables=[torch.zeros(config.slots_max, 8, dtype=torch.int32) for _ in pools.pools],
        last_token_X=torch.zeros(config.slots_max, dtype=torch.int64),
    )
    assert graph is not None

    def run(plan: StepPlan) -> tuple[torch.Tensor, list[int]]:
        logits_SV, tokens = graph.run(plan)
        return logits_SV, tokens.tolist()

    for seed in range(3):
        check_steps(run, config, expected, vocabulary=model.config.vocab_size, seed=seed)


def test_recorded_steps_with_drafts_give_the_bits_of_decoding_one_by_one(smollm2: Model) -> None:
    check_recorded(smollm2)


def test_recorded_steps_of_dense_weights_give_the_bits_of_decoding_one_by_one(
    tiny: Callable[[str, torch.dtype], Model],
) -> None:
    check_recorded(tiny("llama", torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "qwen3-moe", "deepseek-v3"])
def test_any_family_gives_the_bits_of_decoding_one_by_one(
    tiny: Callable[[str, torch.dtype], Model],
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(name, dtype)
    config = config_for(model)
    expected = [decode_one_by_one(model, list(prompt)) for prompt in PROMPTS]
    runner = Runner(model, pools_of(model, config), config, device=CPU, threads=1)
    forward, seen = model.forward, []

    def watched(batch: ForwardBatch, pools: KVPools) -> torch.Tensor:
        logits_SV = forward(batch, pools)
        seen.append(logits_SV.clone())
        return logits_SV

    monkeypatch.setattr(model, "forward", watched)

    def run(plan: StepPlan) -> tuple[torch.Tensor, list[int]]:
        tokens = runner.launch(plan).result().tokens.tolist()
        return seen.pop(), tokens

    def begin(request: Request) -> None:
        bind(runner, request, GREEDY)

    size = model.config.vocab_size
    for seed in range(3):
        check_steps(run, config, expected, begin=begin, vocabulary=size, seed=seed)
    runner.close()


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("warm", [False, True], ids=["through Python", "recorded"])
def test_a_runner_gives_the_tokens_of_decoding_one_by_one(
    tiny: Callable[[str, torch.dtype], Model], warm: bool, overlap_depth: int
) -> None:
    model = tiny("llama", torch.float32)
    config = replace(config_for(model), overlap_depth=overlap_depth)
    expected = [decode_one_by_one(model, list(prompt)) for prompt in PROMPTS]
    runner = Runner(model, pools_of(model, config), config, device=CPU, threads=1)
    if warm:
        runner.warm_up()

    def run(plan: StepPlan) -> tuple[None, list[int]]:
        tokens = runner.launch(plan).result().tokens
        assert tokens.dtype == np.int32
        return None, tokens.tolist()

    def begin(request: Request) -> None:
        bind(runner, request, GREEDY)

    size = model.config.vocab_size
    for seed in range(3):
        check_steps(run, config, expected, begin=begin, vocabulary=size, seed=seed)
    runner.close()


class Followed:
    """Takes what rank 0 sends to the other ranks to another one of this process."""

    def __init__(self, plans: queue.Queue[StepPlan | None]) -> None:
        self._plans = plans

    def send(self, message: ToFollower) -> None:
        assert isinstance(message, Launch)
        self._plans.put(decode_plan(message.plan))

    def failure(self, cause: Exception) -> Exception:
        return cause

    def stop(self) -> None:
        self._plans.put(None)


def test_ranks_that_follow_give_the_tokens_of_decoding_one_by_one(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    plans: queue.Queue[StepPlan | None] = queue.Queue()

    def run_rank(rank: int, store: Store) -> None:
        model = load(tmp_path, Mesh(tp=2), rank, store, native=True)
        expected = [decode_one_by_one(model, list(prompt)) for prompt in PROMPTS]
        config = config_for(model)
        runner = Runner(model, pools_of(model, config), config, device=CPU, threads=1)
        if rank == 1:
            while (plan := plans.get()) is not None:
                runner.follow(plan)
            return
        group: Any = Followed(plans)
        leader = GroupRunner(runner, group, slots_max=config.slots_max)

        def run(plan: StepPlan) -> tuple[None, list[int]]:
            return None, leader.launch(plan).result().tokens.tolist()

        def begin(request: Request) -> None:
            bind(runner, request, GREEDY)

        try:
            size = model.config.vocab_size
            check_steps(run, config, expected, begin=begin, vocabulary=size, seed=0)
        finally:
            leader.close()

    in_threads(2, run_rank)
