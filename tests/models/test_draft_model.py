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
from tokenspeed.execution.draft_passes import Drafting
from tokenspeed.execution.draft_window import seat_pages
from tokenspeed.execution.graph import StepGraph
from tokenspeed.modeling import Head, Model

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


def pools_of(model: Model, config: SchedulerConfig, *, pages: int = 64) -> KVPools:
    pools = KVPools(model.kv_specs(), pages=pages, page_size=config.page_size, device=CPU)
    for pool in pools.pools:
        for layer in range(pool.spec.layers):
            for part in (pool.latents(layer),) if pool.spec.latent else pool.layer(layer):
                part.fill_(float("nan") if part.is_floating_point() else 0)
    return pools


def runner_of(
    target: Model,
    draft: Model,
    config: SchedulerConfig,
    *,
    window: int = 128,
    seats: int = 3,
    **options: float,
) -> Runner:
    if isinstance(draft, Head):
        drafting = Drafting(model=draft, pools=pools_of(draft, config), groups=(0,), **options)
    else:
        pages = seats * seat_pages(window, config.page_size)
        pools = pools_of(draft, config, pages=pages)
        drafting = Drafting(model=draft, pools=pools, window=window, **options)
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


@pytest.mark.parametrize(("chance_min", "count"), [(0.0, 6), (1.1, 1)])
def test_a_proposal_ends_where_it_is_hardly_right(
    tiny: Load, chance_min: float, count: int
) -> None:
    runner = runner_of(tiny(), tiny(), CONFIG, chance_min=chance_min)
    alone = Alone(runner, [*range(20, 33)])
    assert [len(alone.step(6)[0]) for _ in range(7)] == [count] * 7
    runner.close()


# --- how much it reads ---


class Alone:
    """A request whose output is decoded token by token."""

    def __init__(self, runner: Runner, prompt: list[int], *, slot: int = 2) -> None:
        self.runner = runner
        self.planner = Planner(CONFIG)
        self.request = Request(slot=slot, prompt=prompt)
        self.text = [*prompt]
        bind(runner, self.request, GREEDY)

    def step(self, asked: int) -> tuple[list[int], int]:
        """What is proposed to follow, of so many tokens asked for, and how many tokens the draft
        model read first."""
        fed = self.request.length
        plan = (
            self.planner.plan([self.request])
            if fed
            else self.planner.plan([], [(self.request, len(self.request.prompt))])
        )
        counts = np.full(1, asked, dtype=np.int32)
        result = self.runner.launch(replace(plan, propose_counts=counts)).result()
        self.text += result.tokens.tolist()
        return result.proposed_tokens.tolist(), result.caught_up_tokens


@pytest.mark.parametrize("prompt", [9, 16, 17, 60])
def test_it_reads_nothing_before_it_is_asked_and_then_a_window_at_most(
    tiny: Load, prompt: int
) -> None:
    draft = tiny(0.1)
    runner = runner_of(tiny(), draft, CONFIG, window=16)
    alone = Alone(runner, [*range(20, 20 + prompt)])
    assert alone.step(0) == ([], 0)
    assert alone.step(0) == ([], 0)
    for step in range(60):
        proposed, read = alone.step(3 if step % 4 else 0)
        if step % 4 == 0:
            assert (proposed, read) == ([], 0)
            continue
        if step == 1:
            base = max(0, len(alone.text) - 16)
            assert read == len(alone.text) - base - 1
        elif len(alone.text) + 3 - base > 48:
            # The seat is full.
            base = len(alone.text) - 16
            assert read == 15
        else:
            assert read <= 2
        # It takes the window for a text of its own, which begins as the whole does.
        window = [alone.text[0], *alone.text[base + 1 :]]
        assert proposed == greedy(draft, window, 3)
    runner.close()


def test_after_a_pause_it_reads_no_more_than_a_window(tiny: Load) -> None:
    draft = tiny(0.1)
    runner = runner_of(tiny(), draft, CONFIG, window=16)
    alone = Alone(runner, [*range(20, 29)])
    alone.step(0)
    assert alone.step(1)[1] == 10
    for _ in range(25):
        alone.step(0)
    proposed, read = alone.step(2)
    assert read == 15
    assert proposed == greedy(draft, [alone.text[0], *alone.text[-15:]], 2)
    runner.close()


def test_who_has_not_proposed_for_longest_gives_its_seat(tiny: Load) -> None:
    draft = tiny(0.1)
    runner = runner_of(tiny(), draft, CONFIG, seats=2)
    first, second, third = (Alone(runner, [*prompt], slot=n) for n, prompt in enumerate(PROMPTS))
    for alone in (first, second, third):
        alone.step(0)
    for alone in (first, second):
        assert alone.step(2)[0] == greedy(draft, alone.text, 2)
    assert third.step(2) == ([], 0)
    for _ in range(40):
        third.step(0)
        assert second.step(1)[1] <= 1
    # A seat that was not used for long is taken, and what was read in it read again later.
    proposed, read = third.step(2)
    assert proposed == greedy(draft, third.text, 2)
    assert read == len(third.text) - 1
    assert first.step(2) == ([], 0)
    # The slot's next request knows nothing of the one before.
    other = Alone(runner, [8, 9, 10], slot=1)
    assert other.step(2)[0] == greedy(draft, other.text, 2)
    assert first.step(2) == ([], 0)
    runner.close()
