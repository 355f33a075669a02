"""A draft model beside a target: what it proposes is what it would say itself, and nothing that it
says changes a token."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from tests.models.test_step_graph import packed_model
from tests.models.tiny import build, read_tensors, write_tiny
from tests.support.forward import Driver
from tests.unit.execution.tiny import CPU, GREEDY, Planner, Request, bind, config_of
from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.step import StepPlan, StepResult
from tokenspeed.execution import Runner
from tokenspeed.execution.draft_model import Drafting
from tokenspeed.execution.graph import StepGraph
from tokenspeed.modeling import Model

PROMPTS = ([40, 30, 50, 77, 6], [90, 12, 13], [*range(45, 95)])
SLOTS = (3, 0, 6)
OUTPUT = 40
CONFIG = config_of(
    pages=64,
    page_size=16,
    context_max=128,
    step_drafts_max=24,
    step_proposals_max=24,
    proposal_length_max=6,
)

Load = Callable[..., Model]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Load:
    @cache
    def load(noise: float = 0.0, *, native: bool = True) -> Model:
        folder = tmp_path_factory.mktemp("tiny")
        write_tiny("llama", folder)
        hf_config = json.loads((folder / "config.json").read_text())
        dtype = torch.bfloat16 if native else torch.float32
        model = build(hf_config, dtype=dtype, native_formats=native)
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in read_tensors(folder).items()
        }
        model.load_weights(tensors.items())
        return model

    return load


def pools_of(model: Model, config: SchedulerConfig) -> KVPools:
    pools = KVPools(model.kv_specs(), pages=64, page_size=config.page_size, device=CPU)
    for pool in pools.pools:
        for layer in range(pool.spec.layers):
            for part in (pool.latents(layer),) if pool.spec.latent else pool.layer(layer):
                part.fill_(float("nan") if part.is_floating_point() else 0)
    return pools


def runner_of(target: Model, draft: Model, config: SchedulerConfig, **options: float) -> Runner:
    drafting = Drafting(model=draft, pools=pools_of(draft, config), groups=(0,), **options)
    runner = Runner(
        target, pools_of(target, config), config, device=CPU, threads=1, drafting=drafting
    )
    runner.warm_up()
    return runner


class Users:
    """Three requests that join one after the other; what is proposed becomes a draft."""

    def __init__(self, runner: Runner, config: SchedulerConfig, seed: int) -> None:
        self.runner = runner
        self.planner = Planner(config)
        self.config = config
        self.dice = random.Random(seed)
        self.requests = [
            Request(slot=slot, prompt=list(prompt))
            for slot, prompt in zip(SLOTS, PROMPTS, strict=True)
        ]
        self.outputs: list[list[int]] = [[], [], []]
        self.drafts: dict[int, list[int]] = {}
        # Of each output length, what was proposed to follow, and the chances.
        self.proposed: list[dict[int, tuple[list[int], list[float]]]] = [{}, {}, {}]
        self.drafted = self.accepted = 0

    def run(self, *, most: int) -> None:
        """Run them to their ends."""
        joined = 0
        while min(map(len, self.outputs)) < OUTPUT:
            decoding = [index for index in range(3) if 0 < len(self.outputs[index]) < OUTPUT]
            self.dice.shuffle(decoding)
            prefills: list[tuple[Request, int]] = []
            if joined < 3 and not self.dice.randrange(2):
                request = self.requests[joined]
                if request.length == 0:
                    bind(self.runner, request, GREEDY)
                left = len(request.prompt) - request.length
                prefills.append((request, min(left, self.dice.randrange(1, 20))))
            if not decoding and not prefills:
                continue
            rows = [*decoding, *([joined] if prefills else [])]
            counts = np.array([self.dice.randrange(most + 1) for _ in rows], dtype=np.int32)
            drafts = {
                SLOTS[index]: self.drafts.pop(index)[: OUTPUT - len(self.outputs[index]) - 1]
                for index in decoding
                if index in self.drafts
            }
            plan = self.planner.plan(
                [self.requests[index] for index in decoding], prefills, drafts=drafts
            )
            plan = replace(plan, propose_counts=counts)
            result = self.runner.launch(plan).result()
            joined += self._take(plan, result, rows, drafts)

    def _take(
        self, plan: StepPlan, result: StepResult, rows: list[int], drafts: dict[int, list[int]]
    ) -> int:
        at = 0
        tokens = result.tokens.tolist()
        began = 0
        for row, index in enumerate(rows):
            samples = int((plan.sample_rows == row).sum())
            of_row = tokens[at : at + samples]
            at += samples
            if row < plan.decode_count:
                draft = drafts.get(SLOTS[index], [])
                counting = 1
                while counting <= len(draft) and of_row[counting - 1] == draft[counting - 1]:
                    counting += 1
                self.planner.landed(self.requests[index], draft, counting)
                self.drafted += len(draft)
                self.accepted += counting - 1
                of_row = of_row[:counting]
            elif of_row:
                began = 1
            self.outputs[index] += of_row
            first, end = result.proposed_starts[row : row + 2].tolist()
            proposal = result.proposed_tokens[first:end].tolist()
            assert len(proposal) <= (plan.propose_counts[row] if of_row else 0)
            if proposal:
                self.drafts[index] = proposal
                chances = result.proposed_chances[first:end].tolist()
                self.proposed[index][len(self.outputs[index])] = (proposal, chances)
        return began


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    return Driver(model).greedy(prompt, count)


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_a_model_that_drafts_for_itself_is_always_right(tiny: Load, overlap_depth: int) -> None:
    config = replace(CONFIG, overlap_depth=overlap_depth)
    model = tiny()
    runner = runner_of(model, tiny(), config)
    assert isinstance(runner._steps.recorded, StepGraph)
    users = Users(runner, config, seed=7)
    users.run(most=6)
    for prompt, output in zip(PROMPTS, users.outputs, strict=True):
        assert output == greedy(model, list(prompt), len(output))
    assert users.drafted > 40
    assert users.accepted == users.drafted
    runner.close()


def test_smollm2_is_always_right_about_itself() -> None:
    model = packed_model()
    runner = runner_of(model, packed_model(), CONFIG)
    users = Users(runner, CONFIG, seed=11)
    users.run(most=6)
    for prompt, output in zip(PROMPTS, users.outputs, strict=True):
        assert output == greedy(model, list(prompt), len(output))
    assert users.drafted > 40
    assert users.accepted == users.drafted
    runner.close()


@pytest.mark.parametrize("native", [True, False])
def test_another_model_proposes_what_it_would_say_with_its_own_probabilities(
    tiny: Load, native: bool
) -> None:
    target, draft = tiny(native=native), tiny(0.1, native=native)
    runner = runner_of(target, draft, CONFIG)
    users = Users(runner, CONFIG, seed=3)
    users.run(most=6)
    checked = 0
    for prompt, output, proposed in zip(PROMPTS, users.outputs, users.proposed, strict=True):
        assert output == greedy(target, list(prompt), len(output))
        for length, (tokens, chances) in proposed.items():
            driver = Driver(draft)
            text = [*prompt, *output[:length], *tokens]
            logits_TV = driver.prefill(text, chunk=len(text))
            likely_TV = logits_TV.softmax(-1)[-len(tokens) - 1 : -1]
            wanted = likely_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(chances), wanted, atol=1e-4, rtol=1e-3)
            assert torch.equal(likely_TV.max(-1).values, wanted)
            checked += len(tokens)
    assert checked > 50
    assert users.drafted > users.accepted > 10
    runner.close()


def test_a_proposal_ends_where_its_request_has_no_page_and_where_it_is_hardly_right(
    tiny: Load,
) -> None:
    model = tiny()
    for chance_min in (0.0, 1.1):
        runner = runner_of(model, tiny(), CONFIG, chance_min=chance_min)
        planner = Planner(CONFIG)
        request = Request(slot=2, prompt=[*range(20, 33)])
        bind(runner, request, GREEDY)
        plan = planner.plan([], [(request, 13)])
        lengths = []
        for length in range(13, 20):
            counts = np.full(1, 6, dtype=np.int32)
            result = runner.launch(replace(plan, propose_counts=counts)).result()
            room = -length % CONFIG.page_size
            found = int(result.proposed_starts[1])
            assert found == (min(6, room) if chance_min == 0.0 else min(1, room))
            lengths.append(found)
            plan = planner.plan([request])
        assert 0 in lengths
        runner.close()
