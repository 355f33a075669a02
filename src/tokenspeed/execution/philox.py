"""Philox4x32-10, the counter-based generator behind every draw.

J. Salmon, M. Moraes, R. Dror, D. Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011,
section 3.3. A draw is a pure function of the request's seed and the index of its output token, so
it does not matter what shared the batch, how the prompt was chunked, or how often the request was
retracted.

Legend: N draws.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["philox4x32", "uniforms"]

UInt32Array = npt.NDArray[np.uint32]

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
# Added to the key between rounds: the golden ratio and sqrt(3) - 1 as 32-bit fractions.
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
LOW_32 = np.uint64(0xFFFFFFFF)
BITS_32 = np.uint64(32)


def philox4x32(counters_N4: UInt32Array, keys_N2: UInt32Array) -> UInt32Array:
    """Four random words for each counter.

    Args:
        counters_N4: uint32 [N, 4].
        keys_N2: uint32 [N, 2].

    Returns:
        uint32 [N, 4].
    """
    # Words are held in 64 bits, where the 32 x 32 bit products fit.
    c0, c1, c2, c3 = counters_N4.astype(np.uint64).T
    k0, k1 = keys_N2.astype(np.uint64).T
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> BITS_32) ^ c1 ^ k0,
            p1 & LOW_32,
            (p0 >> BITS_32) ^ c3 ^ k1,
            p0 & LOW_32,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW_32, (k1 + KEY_STEPS[1]) & LOW_32
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(
    seeds_N: npt.NDArray[np.uint64], positions_N: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """One uniform number for each draw, float64 [N], never 0 and never 1.

    Args:
        seeds_N: 64-bit seeds: the keys, low word first.
        positions_N: index of the output token to be drawn, at least 0: the counters.
    """
    seeds_N = seeds_N.astype(np.uint64)
    keys_N2 = np.stack([seeds_N & LOW_32, seeds_N >> BITS_32], axis=1).astype(np.uint32)
    counters_N4 = np.zeros((len(positions_N), 4), dtype=np.uint32)
    counters_N4[:, 0] = positions_N
    words_N4 = philox4x32(counters_N4, keys_N2).astype(np.uint64)
    # 52 bits leave room for the half that keeps both ends out without rounding.
    bits_N = (words_N4[:, 0] >> np.uint64(6)) << np.uint64(26) | words_N4[:, 1] >> np.uint64(6)
    return (bits_N.astype(np.float64) + 0.5) * 2.0**-52
