"""Philox against the published vectors, and what the stream promises."""

import numpy as np
import pytest

from tokenspeed.execution.philox import philox4x32, uniforms

# Known answers of Philox4x32-10, published with the paper's own implementation.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_philox_gives_the_published_answers_alone_and_together():
    counters = np.array([vector[0] for vector in VECTORS], dtype=np.uint32)
    keys = np.array([vector[1] for vector in VECTORS], dtype=np.uint32)
    answers = np.array([vector[2] for vector in VECTORS], dtype=np.uint32)
    np.testing.assert_array_equal(philox4x32(counters, keys), answers)
    for row in range(len(VECTORS)):
        one = slice(row, row + 1)
        np.testing.assert_array_equal(philox4x32(counters[one], keys[one]), answers[one])


def test_a_draw_takes_both_halves_of_the_seed_and_the_position():
    seeds = np.array([7, 7, 7 + (1 << 32), 8], dtype=np.uint64)
    positions = np.array([0, 1, 0, 0], dtype=np.int32)
    assert len(set(uniforms(seeds, positions).tolist())) == 4


def test_a_draw_is_the_first_words_of_its_counter():
    words = VECTORS[0][2]
    expected = ((words[0] >> 6 << 26 | words[1] >> 6) + 0.5) / 2**52
    drawn = uniforms(np.zeros(1, dtype=np.uint64), np.zeros(1, dtype=np.int32))
    assert drawn.tolist() == [expected]


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_draws_are_uniform_and_never_reach_an_end(seed):
    drawn = uniforms(np.full(100_000, seed, dtype=np.uint64), np.arange(100_000))
    assert drawn.min() > 0.0
    assert drawn.max() < 1.0
    counts = np.histogram(drawn, bins=64, range=(0, 1))[0]
    expected = len(drawn) / 64
    # Chi-square with 63 degrees of freedom exceeds 131 once in a million.
    assert ((counts - expected) ** 2 / expected).sum() < 131
