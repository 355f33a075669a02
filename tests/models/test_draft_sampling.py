"""With drafts a request gets the tokens and the log-probabilities it gets without, however it is
sampled: guesses change nothing but how many tokens a step gives."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tests.models.tiny import build, read_tensors, write_tiny
from tests.support.grammars import grammar
from tests.unit.execution.tiny import CPU, Planner, Request, config_of
from tokenspeed.cache import KVPools
from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.core.errors import InvalidParameter
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import SampledLogprobs, StepPlan, StepResult
from tokenspeed.execution import Runner
from tokenspeed.execution.cuts import CutPlan
from tokenspeed.grammar import Matcher, TokenTable
from tokenspeed.modeling import Model

OUTPUT = 18
# The model's 199 tokens: letters, digits, some pairs, an end, and what stands for nothing.
TEXTS = [*"abcdefghijklmnopqrstuvwxyz0123456789", *(f"{a}{b}" for a in "abcd" for b in "efghij")]
TABLE = TokenTable(
    texts=[*(text.encode() for text in [*TEXTS, "</s>"]), *[b""] * 138], special=[60], ends=[60]
)
STOPS = (3, 4, 5, 17)
CASES: tuple[tuple[SamplingParams, str | None], ...] = (
    (SamplingParams(temperature=0.0), None),
    (SamplingParams(temperature=0.9, top_p=0.9), None),
    (SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4), None),
    (SamplingParams(temperature=0.0, presence_penalty=2.0), None),
    (SamplingParams(top_k=9, min_p=0.05), None),
    (SamplingParams(temperature=0.0, min_new_tokens=12, logit_bias={3: 50.0, 8: 20.0}), None),
    (SamplingParams(temperature=2.0, min_new_tokens=7, frequency_penalty=1.0), None),
    (SamplingParams(logit_bias=dict.fromkeys(range(9), 4.0)), None),
    (SamplingParams(temperature=0.0, logprobs=3), None),
    (SamplingParams(logprobs=0, repetition_penalty=0.8), None),
    (SamplingParams(temperature=0.0), "[a-d]+7[x-z]{3,}9[0-4]*"),
    (SamplingParams(temperature=1.2, logprobs=1), "([a-j]{2}[0-9])*"),
    (SamplingParams(repetition_penalty=1.3), "(ae|bf|cg)+[k-z]*"),
    (SamplingParams(temperature=0.9, ignore_eos=True), "[a-z]{4}"),
    (SamplingParams(temperature=0.0, logit_bias={60: 100.0}, ignore_eos=True), "[a-z]*"),
)


@dataclass(eq=False)
class Sampled(Request):
    """A request and what it got."""

    case: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[int], list[float]]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        confined = CASES[self.case][1] is not None
        return len(self.tokens) >= OUTPUT or (confined and self.tokens[-1:] == [60])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny("llama", folder)
    model = build(json.loads((folder / "config.json").read_text()), native_formats=True)
    model.load_weights(read_tensors(folder).items())
    yield model


def runner_for(model: Model, *, recorded: bool, overlap_depth: int = 0) -> tuple[Runner, Planner]:
    config = config_of(
        page_size=16, pages=80, context_max=128, slots_max=16, overlap_depth=overlap_depth
    )
    config = replace(config, step_drafts_max=128, step_tokens_max=256)
    pools = KVPools(model.kv_specs(), pages=80, page_size=config.page_size, device=CPU)
    runner = Runner(model, pools, config, device=CPU, threads=1)
    if recorded:
        runner.warm_up()
    return runner, Planner(config)


def begin(runner: Runner, case: int, slot: int) -> Sampled:
    params, pattern = CASES[case]
    prompt = [(7 * case + 3 * index) % 60 for index in range(5 + 2 * case)]
    runner.bind(
        slot,
        params,
        seed=1000 + case,
        prompt_count=len(prompt),
        tokens=np.array(prompt, dtype=np.int32),
        stop_token_ids=np.array(STOPS if pattern is None else TABLE.ends, dtype=np.int32),
        grammar=None if pattern is None else grammar(StructuredOutputs(regex=pattern), TABLE),
    )
    return Sampled(slot=slot, prompt=prompt, case=case)


def take(
    plan: StepPlan, result: StepResult, rows: list[Sampled], drafts: dict[int, list[int]]
) -> None:
    """Give each row's request what counts."""
    assert not result.failures
    reported = {}
    if result.logprobs is not None:
        found = result.logprobs
        assert (np.diff(found.sample_indices) > 0).all()
        for entry, sample in enumerate(found.sample_indices.tolist()):
            count = int(found.top_counts[entry])
            reported[sample] = (
                float(found.chosen[entry]),
                found.top_token_ids[entry, :count].tolist(),
                found.top_values[entry, :count].tolist(),
            )
    sample, counting = 0, set()
    for request in rows:
        draft = drafts.get(request.slot, [])
        right = True
        taken = 0
        for index in range(1 + len(draft)):
            if right and not request.over:
                counting.add(sample)
                taken += 1
                request.tokens.append(int(result.tokens[sample]))
                if sample in reported:
                    request.logprobs.append(reported[sample])
                right = index < len(draft) and draft[index] == request.tokens[-1]
            sample += 1
        if not request.over:
            Planner.landed(request, draft, taken)
    assert sample == len(result.tokens)
    over = {index for index, row in enumerate(plan.sample_rows.tolist()) if rows[row].over}
    # None is reported in vain, but behind the end of a text.
    assert set(reported) <= counting | over


def alone(model: Model, case: int) -> Sampled:
    """Decoded one by one, with nothing beside it."""
    runner, planner = runner_for(model, recorded=False)
    request = begin(runner, case, slot=case % 16)
    plan = planner.plan([], [(request, len(request.prompt))])
    while True:
        take(plan, runner.launch(plan).result(), [request], {})
        if request.over:
            break
        plan = planner.plan([request])
    runner.close()
    return request


@pytest.fixture(scope="module")
def expected(model: Model) -> list[Sampled]:
    return [alone(model, case) for case in range(len(CASES))]


def guess(expected: Sampled, done: int, dice: random.Random) -> list[int]:
    """What comes, as far as the dice say, and then something else; at times beyond the end."""
    draft = expected.tokens[done : done + dice.randrange(8)]
    draft += [dice.randrange(60) for _ in range(dice.randrange(3))]
    return draft[:8]


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("recorded", [False, True], ids=["through Python", "recorded"])
def test_drafts_change_no_token_and_no_log_probability(
    model: Model, expected: list[Sampled], recorded: bool, overlap_depth: int
) -> None:
    for seed in range(4):
        dice = random.Random(seed)
        runner, planner = runner_for(model, recorded=recorded, overlap_depth=overlap_depth)
        requests = [begin(runner, case, slot) for slot, case in enumerate(range(len(CASES)))]
        dice.shuffle(requests)
        waiting, running = list(requests), []
        steps = 0
        while waiting or running:
            rows = [request for request in running if dice.randrange(5)]
            drafts = {
                request.slot: guess(expected[request.case], len(request.tokens), dice)
                for request in rows
                if dice.randrange(4)
            }
            joining = [waiting.pop() for _ in range(min(len(waiting), dice.randrange(4)))]
            if not rows and not joining:
                continue
            plan = planner.plan(
                rows, [(request, len(request.prompt)) for request in joining], drafts=drafts
            )
            result = runner.launch(plan).result()
            take(plan, result, [*rows, *joining], drafts)
            running = [request for request in [*running, *joining] if not request.over]
            steps += 1
        runner.close()
        for request in requests:
            wanted = expected[request.case]
            assert request.tokens == wanted.tokens, (seed, CASES[request.case])
            assert request.logprobs == wanted.logprobs, (seed, CASES[request.case])
        # Much less than a step a token.
        assert steps < sum(len(request.tokens) for request in requests) / 4


@pytest.mark.parametrize("recorded", [False, True], ids=["through Python", "recorded"])
@pytest.mark.parametrize("allowed", [0, 2])
def test_a_draft_is_cut_before_what_the_grammar_forbids(
    model: Model, recorded: bool, allowed: int
) -> None:
    runner, planner = runner_for(model, recorded=recorded)
    case = next(index for index, (_, pattern) in enumerate(CASES) if pattern == "[a-z]{4}")
    request = begin(runner, case, slot=0)
    plan = planner.plan([], [(request, len(request.prompt))])
    take(plan, runner.launch(plan).result(), [request], {})
    # Digits, which no text has; what is sampled is a letter.
    draft = [*range(allowed), 26, 26, 26]
    forward, fed = runner._compute, []
    runner._compute = lambda plan: fed.append(plan) or forward(plan)  # type: ignore[method-assign]
    plan = planner.plan([request], drafts={0: draft})
    result = runner.launch(plan).result()
    assert result.cuts == {0: allowed}
    (run,) = fed
    assert len(run.token_ids) == len(run.sample_rows) == len(run.groups[0].kv_slots) == 1 + allowed
    take(plan, result, [request], {0: draft})
    assert len(request.tokens) >= 2
    assert request.tokens[1] < 26 or request.tokens[1] >= 36
    runner.close()


def test_what_is_left_of_a_cut_plan_keeps_all_other_rows() -> None:
    planner = Planner(config_of(pages=64))
    rows = [Request(slot=slot, prompt=[1], length=3, sampled=4) for slot in (5, 2, 7)]
    late = Request(slot=1, prompt=[9] * 6, length=2)
    plan = planner.plan(rows, [(late, 4)], drafts={5: [11, 12], 2: [21, 22, 23], 7: [31]})
    cut = CutPlan.of(plan, lambda slot, guesses: {5: 2, 2: 1, 7: 0}[slot])
    assert cut is not None
    assert cut.cuts == {2: 1, 7: 0}
    assert cut.plan.query_starts.tolist() == [0, 3, 5, 6, 10]
    assert cut.plan.token_ids.tolist() == [0, 11, 12, 0, 21, 0, 9, 9, 9, 9]
    assert cut.plan.sample_rows.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert cut.plan.sample_positions.tolist() == [4, 5, 6, 4, 5, 4, 0]
    kept = [0, 1, 2, 3, 4, 7, *range(9, 13)]
    assert cut.plan.groups[0].kv_slots.tolist() == plan.groups[0].kv_slots[kept].tolist()
    logprobs = SampledLogprobs(
        sample_indices=np.array([4, 5], dtype=np.int32),
        chosen=np.zeros(2, dtype=np.float32),
        top_token_ids=np.zeros((2, 0), dtype=np.int32),
        top_values=np.zeros((2, 0), dtype=np.float32),
        top_counts=np.zeros(2, dtype=np.int32),
    )
    whole = cut.whole(StepResult(tokens=np.arange(1, 8, dtype=np.int32), logprobs=logprobs))
    assert whole.tokens.tolist() == [1, 2, 3, 4, 5, 0, 0, 6, 0, 7]
    assert whole.logprobs is not None
    assert whole.logprobs.sample_indices.tolist() == [4, 7]
    assert CutPlan.of(plan, lambda slot, guesses: len(guesses)) is None


@pytest.mark.parametrize("reached", [True, False])
def test_a_grammar_that_cannot_be_followed_inside_a_draft_fails_its_request_if_it_comes_so_far(
    model: Model, monkeypatch: pytest.MonkeyPatch, expected: list[Sampled], reached: bool
) -> None:
    case = next(index for index, (_, pattern) in enumerate(CASES) if pattern == "[a-z]*")
    runner, planner = runner_for(model, recorded=True)
    request = begin(runner, case, slot=0)
    plan = planner.plan([], [(request, len(request.prompt))])
    take(plan, runner.launch(plan).result(), [request], {})
    # The thread is through with the first token.
    runner._confinement._confined[0].ready.result()
    draft = expected[case].tokens[1:5]
    if not reached:
        draft[1] = (draft[1] + 1) % 26
    take_tokens, calls = Matcher.take, []

    def too_much(matcher: Matcher, tokens: list[int]) -> None:
        calls.append(tokens)
        if len(calls) == 2:
            raise InvalidParameter("too much work")
        take_tokens(matcher, tokens)

    monkeypatch.setattr(Matcher, "take", too_much)
    result = runner.launch(planner.plan([request], drafts={0: draft})).result()
    assert result.tokens[:2].tolist() == expected[case].tokens[1:3]
    assert result.failures == ({0: "too much work"} if reached else {})
    runner._confinement._confined[0].ready.result()
    runner.close()
    # The guesses, looked at beforehand, and then what was sampled.
    sampled = [] if reached else [expected[case].tokens[1:3]]
    assert calls == [*([token] for token in draft[:2]), *sampled]
