"""The sampling ops against plain formulas, and at the edges of their input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.execution.oracle import distribution
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.kernels import reference
from tokenspeed.kernels.ops import sampling

INF = math.inf
NAN = math.nan


def draw(
    logits: torch.Tensor,
    uniforms: list[float] | torch.Tensor,
    *,
    kernel=sampling.draw,
    **settings,
) -> torch.Tensor:
    """Draws from rows that share their settings."""
    count = len(logits)
    values = {"temperature": 1.0, "top_k": logits.shape[1], "top_p": 1.0, "min_p": 0.0, **settings}
    return kernel(
        logits,
        torch.as_tensor(uniforms, dtype=torch.float64),
        temperatures_S=torch.full((count,), values["temperature"], dtype=torch.float64),
        top_ks_S=torch.full((count,), values["top_k"], dtype=torch.int64),
        top_ps_S=torch.full((count,), values["top_p"], dtype=torch.float64),
        min_ps_S=torch.full((count,), values["min_p"], dtype=torch.float64),
    )


def support(logits: torch.Tensor, **settings) -> set[int]:
    """Every token that some uniform number draws, of a row small enough to try."""
    uniforms = torch.linspace(1e-9, 1 - 1e-9, 401, dtype=torch.float64)
    return set(draw(logits.expand(len(uniforms), -1), uniforms, **settings).tolist())


def test_argmax_takes_the_lowest_id_of_equals():
    logits = torch.zeros(3, 1000)
    logits[1, [700, 300]] = 1.0
    assert sampling.argmax(logits).tolist() == [0, 300, 0]


def test_argmax_counts_nan_as_impossible_and_survives_infinities():
    rows = [[NAN, 1, 2], [NAN, NAN, NAN], [-INF, -INF, -INF], [0, INF, INF], [NAN, -INF, -9]]
    assert sampling.argmax(torch.tensor(rows)).tolist() == [2, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("row", "drawn"),
    [
        ([NAN, 1.0, NAN], {1}),
        ([NAN, NAN, NAN], {0}),
        ([-INF, -INF, -INF], {0}),
        ([0.0, INF, INF], {1, 2}),
        ([-INF, 3.0, 3.0], {1, 2}),
    ],
)
def test_a_draw_counts_nan_as_impossible_and_survives_infinities(row, drawn):
    for filters in ({}, {"top_k": 2}, {"top_p": 0.999}, {"min_p": 0.1}):
        assert support(torch.tensor(row), **filters) == drawn, filters


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 5e-324])
def test_the_least_temperatures_draw_the_likeliest(temperature):
    logits = torch.tensor([0.1, 0.5, 0.4999, -INF])
    assert support(logits, temperature=temperature, top_p=0.9) == {1}
    assert support(logits, temperature=temperature) == {1}
    assert support(torch.tensor([2.0, 7.0, 7.0]), temperature=temperature) == {1, 2}


def test_top_k_of_the_vocabulary_or_more_keeps_all():
    logits = torch.tensor([0.0, 1.0, 0.5])
    assert support(logits, top_k=3) == support(logits, top_k=10**9) == {0, 1, 2}


def test_top_k_keeps_the_lowest_ids_of_equals():
    assert support(torch.zeros(7), top_k=3) == {0, 1, 2}
    assert support(torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0]), top_k=3) == {0, 2, 3}


def test_top_p_keeps_the_lowest_ids_of_equals():
    assert support(torch.zeros(8), top_p=0.5) == {0, 1, 2, 3}
    assert support(torch.zeros(8), top_p=0.51) == {0, 1, 2, 3, 4}


def test_top_p_is_reached_within_what_top_k_left():
    # Of the two tokens kept the first holds 0.62, so half is reached with it alone.
    logits = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert support(logits, top_k=2, top_p=0.5) == {0}
    assert support(logits, top_p=0.5) == {0, 1, 2}


def test_min_p_is_a_fraction_of_the_likeliest():
    logits = torch.tensor([0.5, 0.26, 0.24]).log()
    assert support(logits, min_p=0.5) == {0, 1}
    assert support(logits, min_p=1.0) == {0}


def test_a_draw_goes_up_the_ids_whatever_the_filters():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    marks = [0.05, 0.15, 0.45, 0.55, 0.65, 0.75, 0.95]
    for filters in ({}, {"top_k": 4}, {"top_p": 0.9999}, {"min_p": 0.01}):
        drawn = draw(logits.expand(len(marks), -1), marks, **filters)
        assert drawn.tolist() == [0, 1, 1, 2, 2, 3, 3], filters


@pytest.mark.parametrize("kernel", [sampling.draw, reference.sampling.draw])
def test_the_least_and_the_greatest_number_draw_what_is_possible(kernel):
    logits = torch.tensor([-INF, -1.0, 1.0, 1.0, 0.0, NAN]).expand(2, -1)
    uniforms = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    for filters, first, last in (
        ({}, 1, 4),
        ({"top_k": 2}, 2, 3),
        ({"top_p": 0.6}, 2, 3),
        ({"min_p": 0.3}, 2, 4),
        ({"min_p": 1.0}, 2, 3),
    ):
        drawn = draw(logits, uniforms, kernel=kernel, **filters)
        assert drawn.tolist() == [first, last], filters


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 3000),
    spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.one_of(st.none(), st.integers(1, 4000)),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    levels=st.sampled_from([None, 5]),
)
@settings(max_examples=300, deadline=None)
def test_filters_leave_the_tokens_of_the_plain_formula(
    seed, size, spread, temperature, top_k, top_p, min_p, levels
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator) * spread
    if levels is not None:
        # Many equal logits, so that ties fall on every boundary.
        logits = (logits * levels / spread).round() * spread / levels
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = distribution(logits, params)
    sums = np.cumsum(expected)
    uniforms = np.linspace(0, 1, 18)[1:-1]
    drawn = draw(
        logits.expand(16, -1),
        uniforms.tolist(),
        temperature=temperature,
        top_k=top_k or size,
        top_p=top_p,
        min_p=min_p,
    ).numpy()
    # float32 weights move the marks a little; a wrong filter moves them further.
    upper, lower = sums[drawn], sums[drawn] - expected[drawn]
    assert (uniforms < upper + 3e-5).all()
    assert (uniforms > lower - 3e-5).all()


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("top_p", [0.1, 0.95, 0.999])
def test_the_nucleus_of_a_large_vocabulary_is_the_one_a_sort_finds(spread, top_p):
    size = 50_000
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(size, generator=generator) * spread * 64).round() / 64
    expected = distribution(logits, SamplingParams(top_p=top_p))
    sums = np.cumsum(expected)
    uniforms = np.linspace(0, 1, 22)[1:-1]
    drawn = draw(logits.expand(20, -1), uniforms.tolist(), top_p=top_p).numpy()
    assert (uniforms < sums[drawn] + 3e-5).all()
    assert (uniforms > sums[drawn] - expected[drawn] - 3e-5).all()


@pytest.mark.parametrize("top_k", [1, 40, 780, 2000])
def test_top_k_of_a_large_vocabulary_is_the_one_a_sort_finds(top_k):
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(50_000, generator=generator) * 100).round() / 100
    order = logits.argsort(descending=True, stable=True)
    _, ids, _ = sampling.logprobs(logits[None], torch.zeros(1, dtype=torch.int64), top_k)
    assert ids[0].tolist() == order[:top_k].tolist()
    kept = set(order[:top_k].tolist())
    drawn = draw(logits.expand(200, -1), torch.linspace(0.001, 0.999, 200), top_k=top_k)
    assert set(drawn.tolist()) <= kept


def test_a_row_draws_the_same_whatever_lies_beside_it():
    # An odd vocabulary puts rows at every alignment.
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(24, 40_009, generator=generator)
    uniforms = torch.rand(24, generator=generator, dtype=torch.float64)
    for filters in ({}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 100, "top_p": 0.8}):
        together = draw(logits, uniforms, **filters)
        for row in range(24):
            alone = draw(logits[row : row + 1].clone(), uniforms[row : row + 1], **filters)
            assert alone.tolist() == [together[row].item()]


def test_logprobs_are_the_logarithm_of_softmax():
    logits = torch.randn(5, 3001, generator=torch.Generator().manual_seed(6)) * 5
    tokens = torch.tensor([0, 1, 5, 3000, 77])
    chosen, ids, values = sampling.logprobs(logits, tokens, 4)
    expected = logits.double().log_softmax(-1)
    # What float32 weights of a whole vocabulary allow.
    near = {"rtol": 0.0, "atol": 1e-6}
    torch.testing.assert_close(chosen.double(), expected.gather(1, tokens[:, None])[:, 0], **near)
    torch.testing.assert_close(values.double(), expected.gather(1, ids), **near)
    assert torch.equal(ids, logits.topk(4).indices)


def test_all_logprobs_of_a_row_sum_to_one():
    logits = torch.randn(1, 19, generator=torch.Generator().manual_seed(7))
    chosen, ids, values = sampling.logprobs(logits, torch.tensor([3]), 19)
    assert sorted(ids[0].tolist()) == list(range(19))
    assert values.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    assert chosen[0] == values[0, ids[0].tolist().index(3)]


def test_logprobs_stay_finite():
    rows = torch.tensor([[NAN, 0.0, -INF], [NAN, NAN, NAN], [INF, INF, 0.0]])
    chosen, _, values = sampling.logprobs(rows, torch.tensor([0, 0, 2]), 3)
    assert chosen.isfinite().all()
    assert values.isfinite().all()
    assert values[0, 0] == 0.0
    assert values[2, 0].item() == pytest.approx(math.log(0.5))


def test_no_top_logprobs_are_given_where_none_are_asked_for():
    _, ids, values = sampling.logprobs(torch.zeros(2, 300), torch.tensor([0, 1]), 0)
    assert ids.shape == values.shape == (2, 0)


def test_a_bitmask_excludes_what_it_does_not_name():
    size = 71
    allowed = {0, 31, 32, 63, 64, 70}
    words = [0, 0, 0]
    for token in allowed:
        words[token // 32] |= 1 << token % 32
    bitmask = torch.from_numpy(np.array([words, [2**32 - 1] * 3], dtype=np.uint32).view(np.int32))
    logits = torch.zeros(2, size)
    sampling.apply_bitmask(logits, bitmask)
    assert set((logits[0] > -INF).nonzero()[:, 0].tolist()) == allowed
    assert (logits[1] == 0).all()
