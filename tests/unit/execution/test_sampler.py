"""The sampler: each row by its own parameters, in the documented order."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.unit.execution.oracle import distribution
from tests.unit.execution.tiny import kernels
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import CpuSampler, Sampler

V = 40
DRAWS = 20_000
BATCH = 500
INF = math.inf


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.fixture(params=[Sampler, CpuSampler], ids=["torch", "native"])
def sampler(request):
    """Both samplers; the first with native ops, as other devices have it with their own."""

    def make(slots_max: int = 8, vocabulary: int = V) -> Sampler | CpuSampler:
        return request.param(slots_max=slots_max, vocabulary=vocabulary, kernels=kernels())

    return make


def bind(
    sampler: Sampler,
    slot: int,
    params: SamplingParams,
    *,
    seed: int = 0,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    stops: tuple[int, ...] = (),
) -> None:
    sampler.bind(
        slot,
        params,
        seed=seed,
        prompt_count=len(prompt),
        tokens=ints(*prompt, *output) if params.needs_history else None,
        stop_token_ids=ints(*stops),
    )


def sample_one(sampler: Sampler, logits: torch.Tensor, slot: int = 0, position: int = 0) -> int:
    tokens, _ = sampler.sample(logits[None].clone(), ints(slot), ints(position))
    return int(tokens[0])


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


PROMPT = (1, 2, 3, 3, 17)
OUTPUT = (4, 4, 4, 5, 17)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        {"logit_bias": {0: 3.0, 7: -100.0}},
        {"repetition_penalty": 1.8, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"repetition_penalty": 0.5, "logit_bias": {4: 2.0}, "temperature": 0.8, "top_p": 0.95},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampler, settings):
    params = SamplingParams(**settings)
    logits = random_logits(V, seed=11)
    expected = distribution(logits, params, prompt=list(PROMPT), output=list(OUTPUT))
    subject = sampler()
    tokens = []
    for start in range(0, DRAWS, BATCH):
        # Rows of one batch see the same history, which grows when they are sampled.
        bind(subject, 0, params, seed=99, prompt=PROMPT, output=OUTPUT)
        positions = np.arange(start, start + BATCH, dtype=np.int32)
        batch = logits.repeat(BATCH, 1)
        tokens += subject.sample(batch, ints(*[0] * BATCH), positions)[0].tolist()
    counts = np.bincount(tokens, minlength=V)
    assert counts[expected == 0].sum() == 0
    # Chi-square needs a handful of draws in every cell, so rare tokens share one.
    rare = expected * DRAWS < 8
    cells = np.append(counts[~rare], counts[rare].sum())
    cells_expected = np.append(expected[~rare], expected[rare].sum()) * DRAWS
    some = cells_expected > 0
    statistic = ((cells - cells_expected)[some] ** 2 / cells_expected[some]).sum()
    freedom = some.sum() - 1
    # Five standard deviations above the mean, and room for the skewed tail of few cells.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 10


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.1},
        {"frequency_penalty": -0.8},
        {"repetition_penalty": 0.7, "presence_penalty": -0.4, "frequency_penalty": 0.9},
    ],
    ids=str,
)
def test_penalties_follow_the_formula_as_the_output_grows(sampler, settings):
    params = SamplingParams(temperature=0.0, **settings)
    subject = sampler()
    bind(subject, 3, params, prompt=PROMPT, output=OUTPUT)
    output = list(OUTPUT)
    for position in range(40):
        logits = random_logits(V, seed=position)
        token = sample_one(subject, logits, slot=3, position=position)
        expected = distribution(logits, params, prompt=list(PROMPT), output=output)
        assert token == int(expected.argmax()), position
        output.append(token)


def test_a_request_bound_again_after_retraction_goes_on_with_the_same_penalties(sampler):
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5)
    rows = [random_logits(V, seed=seed) for seed in range(30)]
    through = sampler()
    bind(through, 0, params, seed=5, prompt=PROMPT)
    tokens = [sample_one(through, row, position=index) for index, row in enumerate(rows)]
    broken = sampler()
    bind(broken, 0, params, seed=5, prompt=PROMPT)
    first = [sample_one(broken, row, position=index) for index, row in enumerate(rows[:11])]
    bind(broken, 6, params, seed=5, prompt=PROMPT, output=tuple(first))
    rest = [
        sample_one(broken, row, slot=6, position=11 + index) for index, row in enumerate(rows[11:])
    ]
    assert first + rest == tokens


def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(sampler):
    params = SamplingParams(temperature=1.3, top_p=0.95)
    others = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3),
        SamplingParams(repetition_penalty=1.2),
    ]
    rows = random_logits(12, V, seed=1)
    alone = sampler()
    bind(alone, 0, params, seed=2**64 - 3)
    expected = [sample_one(alone, row, position=index) for index, row in enumerate(rows)]
    crowded = sampler()
    bind(crowded, 5, params, seed=2**64 - 3)
    for slot, other in enumerate(others):
        bind(crowded, slot, other, seed=slot, prompt=PROMPT)
    got = []
    for index, row in enumerate(rows):
        batch = random_logits(4, V, seed=100 + index)
        place = index % 4
        slots = [0, 1, 2]
        slots.insert(place, 5)
        batch[place] = row
        tokens, _ = crowded.sample(batch, ints(*slots), ints(*[index] * 4))
        got.append(int(tokens[place]))
    assert got == expected
    assert len(set(expected)) > 3


def test_positions_and_seeds_are_different_streams(sampler):
    logits = torch.zeros(V)
    subject = sampler()
    bind(subject, 0, SamplingParams(), seed=1)
    bind(subject, 1, SamplingParams(), seed=2)
    streams = [
        [sample_one(subject, logits, slot=slot, position=position) for position in range(20)]
        for slot in (0, 1)
    ]
    assert streams[0] != streams[1]
    assert len(set(streams[0])) > 8
    assert streams[0][::-1] == [
        sample_one(subject, logits, slot=0, position=position) for position in range(19, -1, -1)
    ]


def test_greedy_and_drawn_rows_share_a_batch(sampler):
    rows = random_logits(7, V, seed=2)
    subject = sampler()
    for slot in range(7):
        greedy = slot in (0, 1, 3, 6)
        bind(subject, slot, SamplingParams(temperature=0.0 if greedy else 1.0), seed=slot)
    tokens, logprobs = subject.sample(rows.clone(), ints(*range(7)), ints(*[0] * 7))
    for slot in range(7):
        assert int(tokens[slot]) == sample_one(subject, rows[slot], slot=slot)
    greedy_rows = [0, 1, 3, 6]
    assert tokens[greedy_rows].tolist() == rows[greedy_rows].argmax(-1).tolist()
    assert logprobs is None


def test_a_batch_may_sample_nothing(sampler):
    tokens, logprobs = sampler().sample(torch.zeros(0, V), ints(), ints())
    assert tokens.shape == (0,)
    assert logprobs is None


def test_stop_tokens_wait_for_the_least_number_of_tokens(sampler):
    logits = torch.zeros(V)
    logits[[9, 10]] = torch.tensor([20.0, 10.0])
    subject = sampler()
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, min_new_tokens=3)
        # An id that no row has can not be sampled anyway.
        bind(subject, 0, params, stops=(9, V + 5))
        got = [sample_one(subject, logits, position=position) for position in range(5)]
        assert got[3:] == [9, 9]
        assert 9 not in got[:3]
        if temperature == 0.0:
            assert got[:3] == [10, 10, 10]


def test_bias_comes_before_penalties(sampler):
    # 1 + 1 halved is below 1.5; 1 halved, plus 1, would be its equal and win by its id.
    logits = torch.full((V,), -5.0)
    logits[[3, 4]] = torch.tensor([1.0, 1.2])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias={3: 1.0})
    subject = sampler()
    bind(subject, 0, params, prompt=(3,))
    assert sample_one(subject, logits) == 4


def bitmask(allowed: set[int]) -> torch.Tensor:
    words = np.zeros(-(-V // 32), dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return torch.from_numpy(words.view(np.int32))


def test_a_bitmask_confines_greedy_and_drawn_rows_and_leaves_the_others_alone(sampler):
    rows = random_logits(3, V, seed=3)
    subject = sampler()
    bind(subject, 0, SamplingParams(temperature=0.0))
    bind(subject, 1, SamplingParams(temperature=5.0, logit_bias={0: 100.0}))
    bind(subject, 2, SamplingParams(temperature=0.0))
    allowed = {33, 5, 39}
    rows[2, 7] = 50.0
    for slot in (0, 1):
        subject.allow(slot, bitmask(allowed))
    for position in range(50):
        tokens, _ = subject.sample(
            rows.clone(),
            ints(0, 1, 2),
            ints(position, position, position),
        )
        assert int(tokens[0]) == max(allowed, key=lambda token: rows[0, token])
        assert int(tokens[1]) in allowed
        assert int(tokens[2]) == 7


def test_rows_of_a_slot_have_bitmasks_in_their_order(sampler):
    rows = random_logits(6, V, seed=11)
    subject = sampler()
    for slot in range(3):
        bind(subject, slot, SamplingParams(temperature=0.0))
    allowed = [{3, 9}, {5, 33}, {0, 7}]
    subject.allow(1, torch.stack([bitmask(tokens) for tokens in allowed]))
    subject.allow(2, bitmask({2}))
    tokens, _ = subject.sample(rows.clone(), ints(0, 1, 1, 1, 1, 2), ints(0, 4, 5, 6, 7, 0))
    likeliest = [int(row.argmax()) for row in rows]
    confined = [
        max(tokens, key=lambda token: row[token])
        for tokens, row in zip(allowed, rows[1:4], strict=True)
    ]
    # Behind those with a bitmask any token may come.
    assert tokens.tolist() == [likeliest[0], *confined, likeliest[4], 2]


def test_a_bitmask_goes_before_the_minimum_length(sampler):
    rows = random_logits(2, V, seed=6)
    subject = sampler()
    params = SamplingParams(temperature=0.0, min_new_tokens=4)
    for slot in range(2):
        bind(subject, slot, params, stops=(3, 4))
    rows[0, 4] = rows[0, 3] + 1
    # Of the first row only stop tokens may come, of the second something else too.
    subject.allow(0, bitmask({3, 4}))
    subject.allow(1, bitmask({3, 9}))
    tokens, _ = subject.sample(rows, ints(0, 1), ints(0, 0))
    assert tokens.tolist() == [4, 9]


def test_log_probabilities_are_those_without_a_bitmask(sampler):
    row = random_logits(1, V, seed=7)
    subject = sampler()
    bind(subject, 0, SamplingParams(temperature=0.0, logprobs=2))
    subject.allow(0, bitmask({5}))
    tokens, logprobs = subject.sample(row.clone(), ints(0), ints(0))
    assert tokens.tolist() == [5]
    assert logprobs.chosen[0] == pytest.approx(float(row.log_softmax(-1)[0, 5]), abs=1e-5)
    assert logprobs.top_token_ids[0, 0] == int(row.argmax())


def test_a_row_with_nothing_left_gets_its_likeliest_token(sampler):
    rows = random_logits(2, V, seed=4)
    rows[0] = -INF
    subject = sampler()
    bind(subject, 0, SamplingParams(temperature=0.0))
    bind(subject, 1, SamplingParams(temperature=1e-4, min_new_tokens=1), stops=tuple(range(V)))
    subject.allow(0, bitmask({8, 9}))
    tokens, _ = subject.sample(rows.clone(), ints(0, 1), ints(0, 0))
    assert tokens.tolist() == [8, int(rows[1].argmax())]


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_leave_other_rows_alone(sampler, bad, temperature):
    rows = random_logits(3, V, seed=5)
    rows[1] = bad
    subject = sampler()
    params = SamplingParams(temperature=temperature, top_p=0.9, repetition_penalty=1.1, logprobs=2)
    for slot in range(3):
        bind(subject, slot, params, prompt=PROMPT, seed=slot)
    tokens, logprobs = subject.sample(rows.clone(), ints(0, 1, 2), ints(0, 0, 0))
    assert 0 <= int(tokens[1]) < V
    assert np.isfinite(logprobs.chosen).all()
    for slot in (0, 2):
        bind(subject, slot, params, prompt=PROMPT, seed=slot)
        assert sample_one(subject, rows[slot], slot=slot) == int(tokens[slot])


def test_logprobs_are_of_the_model_and_not_of_what_was_sampled_from(sampler):
    rows = random_logits(4, V, seed=6)
    subject = sampler()
    bind(subject, 0, SamplingParams(temperature=0.0, logprobs=3))
    bind(subject, 1, SamplingParams(temperature=0.0))
    bind(subject, 2, SamplingParams(temperature=0.1, top_k=1, logit_bias={6: 100.0}, logprobs=0))
    bind(subject, 3, SamplingParams(repetition_penalty=9.0, logprobs=5), prompt=PROMPT)
    tokens, logprobs = subject.sample(rows.clone(), ints(0, 1, 2, 3), ints(0, 0, 0, 0))
    expected = rows.double().log_softmax(-1)
    assert int(tokens[2]) == 6
    assert logprobs.sample_indices.tolist() == [0, 2, 3]
    assert logprobs.top_counts.tolist() == [3, 0, 5]
    assert logprobs.top_token_ids.shape == logprobs.top_values.shape == (3, 5)
    for entry, row in enumerate([0, 2, 3]):
        count = logprobs.top_counts[entry]
        top = expected[row].topk(int(count))
        assert logprobs.chosen[entry] == pytest.approx(expected[row, tokens[row]].item(), rel=1e-5)
        assert logprobs.top_token_ids[entry, :count].tolist() == top.indices.tolist()
        np.testing.assert_allclose(logprobs.top_values[entry, :count], top.values, rtol=1e-5)


def test_more_top_logprobs_than_the_vocabulary_has_are_all_of_it(sampler):
    subject = sampler(vocabulary=7)
    bind(subject, 0, SamplingParams(temperature=0.0, logprobs=20))
    _, logprobs = subject.sample(random_logits(1, 7), ints(0), ints(0))
    assert logprobs.top_counts.tolist() == [7]
    assert np.exp(logprobs.top_values).sum() == pytest.approx(1.0, abs=1e-6)


def test_a_slot_forgets_its_last_request(sampler):
    logits = random_logits(V, seed=7)
    subject = sampler()
    bind(
        subject,
        0,
        SamplingParams(
            temperature=0.7,
            top_k=2,
            min_new_tokens=9,
            logit_bias={0: 50.0},
            frequency_penalty=2.0,
            logprobs=4,
        ),
        prompt=PROMPT,
        stops=(int(logits.argmax()),),
    )
    bind(subject, 0, SamplingParams(temperature=0.0))
    tokens, logprobs = subject.sample(logits[None].clone(), ints(0), ints(0))
    assert tokens.tolist() == [int(logits.argmax())]
    assert logprobs is None
    bind(subject, 0, SamplingParams(temperature=0.0, logit_bias={0: 50.0}))
    assert sample_one(subject, logits) == 0
    bind(subject, 0, SamplingParams(temperature=0.0, presence_penalty=0.01))
    assert sample_one(subject, logits) == int(logits.argmax())


def test_a_token_waits_until_it_is_known_which_it_may_be(sampler):
    row = random_logits(1, V, seed=8)
    subject = sampler()
    bind(subject, 0, SamplingParams(temperature=0.0))
    subject.expect(0)
    waiting = ThreadPoolExecutor(1)
    tokens = waiting.submit(subject.sample, row.clone(), ints(0), ints(0))
    subject.allow(0, bitmask({2, 30}))
    assert tokens.result()[0].tolist() == [max((2, 30), key=lambda token: row[0, token])]
    subject.allow(0, None)
    assert sample_one(subject, row[0]) == int(row[0].argmax())
    waiting.shutdown()


SETTINGS = [
    SamplingParams(temperature=0.0, repetition_penalty=1.3, logprobs=20),
    SamplingParams(presence_penalty=0.7, frequency_penalty=-0.3, logprobs=0),
    SamplingParams(temperature=0.4, top_k=11, min_p=0.01, min_new_tokens=30),
    SamplingParams(repetition_penalty=0.8, logit_bias={0: 4.0, 3: -2.5, 11: 0.3}, top_p=0.9),
    SamplingParams(temperature=0.0, min_new_tokens=9, logit_bias={5: 1.5}, logprobs=3),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=3.0),
]


@pytest.mark.parametrize("vocabulary", [33, 64, 1001])
def test_the_native_sampler_chooses_what_the_other_does(vocabulary):
    both = [
        made(slots_max=8, vocabulary=vocabulary, kernels=kernels())
        for made in (Sampler, CpuSampler)
    ]
    stops = (1, 2, 2, vocabulary + 3)
    for subject in both:
        for slot, params in enumerate(SETTINGS):
            bind(subject, slot, params, seed=7**slot, prompt=PROMPT, output=OUTPUT, stops=stops)
    generator = np.random.default_rng(3)
    for position in range(40):
        logits = random_logits(len(SETTINGS), vocabulary, seed=position)
        order = generator.permutation(len(SETTINGS)).astype(np.int32)
        positions = ints(*[position] * len(order))
        words = generator.integers(-(2**31), 2**31, -(-vocabulary // 32)).astype(np.int32) | 1
        results = []
        for subject in both:
            # Requests come to be confined, and cease to be.
            subject.allow(int(order[0]), torch.from_numpy(words))
            subject.allow(int(order[1]), None)
            results.append(subject.sample(logits.clone(), order, positions))
        (tokens, report), (native_tokens, native_report) = results
        assert native_tokens.tolist() == tokens.tolist(), position
        for field in ("sample_indices", "top_counts", "top_token_ids", "chosen", "top_values"):
            assert np.array_equal(getattr(native_report, field), getattr(report, field)), field


def test_the_native_sampler_leaves_logits_as_they_were():
    subject = CpuSampler(slots_max=8, vocabulary=V, kernels=kernels())
    logits = random_logits(len(SETTINGS), V, seed=9)
    logits[0, 4] = INF
    logits[3, [7, 11]] = -INF
    for slot, params in enumerate(SETTINGS):
        bind(subject, slot, params, prompt=PROMPT, output=OUTPUT, stops=(3, 4))
    before = logits.clone()
    subject.allow(1, bitmask({6, 7}))
    subject.sample(logits, ints(*range(len(SETTINGS))), ints(*[0] * len(SETTINGS)))
    assert torch.equal(logits, before)


def test_the_native_sampler_draws_by_the_same_numbers():
    flat = torch.zeros(1, 2**14)
    both = [
        made(slots_max=1, vocabulary=2**14, kernels=kernels()) for made in (Sampler, CpuSampler)
    ]
    for seed in (0, 1, 2**32 - 1, 2**63 + 12345, 2**64 - 1):
        for subject in both:
            bind(subject, 0, SamplingParams(), seed=seed)
        for position in (0, 1, 77, 2**31 - 1):
            first, second = (sample_one(one, flat[0], position=position) for one in both)
            assert first == second
