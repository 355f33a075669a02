"""Sampling: said again in float64 with sorts, one row at a time, with no regard for cost.

Legend: S rows, V vocabulary, K likeliest tokens.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.verify.case import Call, Case, Compared, compare, equal, noise

__all__ = [
    "argmax_cases",
    "bias_cases",
    "bitmask_cases",
    "draw_cases",
    "logprobs_cases",
    "penalise_cases",
]

_VOCABULARIES = (1, 17, 1000, 40_009)
# Each row of a draw takes the next of each, so that filters meet in many ways.
_TEMPERATURES = (1.0, 0.3, 2.5, 1e-6)
_TOP_PS = (1.0, 0.999, 0.9, 0.5, 0.01)
_MIN_PS = (0.0, 0.02, 0.5)
_TOP_K_SHARES = (1.0, 0.5, 0.1, 0.0)
_DRAWN_ROWS = 32
_REPETITION, _PRESENCE, _FREQUENCY = 1.3, 0.4, 0.2

_Floats = npt.NDArray[np.float64]


def argmax_cases() -> Iterator[Case]:
    """Ties, NaN and infinities among them."""
    for size in _VOCABULARIES:
        yield _case("argmax", f"{size} tokens", partial(_argmax, size))


def draw_cases() -> Iterator[Case]:
    """Every filter, over flat and over steep distributions, without and with many ties."""
    for size in _VOCABULARIES:
        for spread in (0.3, 4.0, 30.0):
            for ties in (False, True):
                words = f"{size} tokens, spread {spread:g}{', ties' if ties else ''}"
                yield _case("draw", words, partial(_draw, size, spread, ties))


def logprobs_cases() -> Iterator[Case]:
    """From none of the likeliest to all of a small vocabulary."""
    for size in _VOCABULARIES:
        for count in (0, min(size, 20)):
            yield _case("logprobs", f"{size} tokens, {count} likeliest", partial(_lp, size, count))


def penalise_cases() -> Iterator[Case]:
    """Each penalty alone, and all."""
    for size in _VOCABULARIES:
        for repetition, presence, frequency in (
            (_REPETITION, 0.0, 0.0),
            (1.0, _PRESENCE, 0.0),
            (1.0, 0.0, _FREQUENCY),
            (_REPETITION, _PRESENCE, _FREQUENCY),
        ):
            yield _case(
                "penalise",
                f"{size} tokens, repetition {repetition:g}, presence {presence:g}, "
                f"frequency {frequency:g}",
                partial(_penalise, size, (repetition, presence, frequency)),
            )


def bias_cases() -> Iterator[Case]:
    """Of no token, of some, of the first and the last."""
    for size in _VOCABULARIES:
        for count in (0, min(size, 33)):
            yield _case("add_bias", f"{size} tokens, {count} biases", partial(_bias, size, count))


def bitmask_cases() -> Iterator[Case]:
    """Vocabularies that end within a word."""
    for size in _VOCABULARIES:
        yield _case("apply_bitmask", f"{size} tokens", partial(_bitmask, size))


def _case(name: str, words: str, check: Callable[[Call, CpuRuntime], Iterator[Compared]]) -> Case:
    return Case(
        op=f"sampling.{name}",
        format_name="float32",
        dtype=torch.float32,
        name=words,
        check=check,
    )


def _numbers(logits_SV: torch.Tensor) -> torch.Tensor:
    """float64, with NaN and infinities as the ops count them."""
    wide_SV = logits_SV.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    finite_SV = wide_SV.masked_fill(wide_SV.isinf(), -torch.inf)
    greatest_S1 = finite_SV.amax(-1, keepdim=True)
    return torch.where(wide_SV == torch.inf, greatest_S1, wide_SV)


def _argmax(size: int, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    logits_SV = noise(9, size, dtype=torch.float32)
    last = size - 1
    logits_SV[1, [last // 3, last // 2, last]] = 9.0
    logits_SV[2, last // 2 :] = torch.nan
    logits_SV[3] = -torch.inf
    logits_SV[4] = torch.nan
    logits_SV[5, last // 2] = torch.inf
    logits_SV[5, last] = torch.finfo(torch.float32).max
    logits_SV[6] = -3.0
    logits_SV[7, last] = 10.0
    logits_SV[8] = torch.nan
    logits_SV[8, last] = -torch.inf
    # numpy gives the first of equals.
    exact = torch.from_numpy(_numbers(logits_SV).numpy().argmax(-1))
    yield equal("tokens", kernel(logits_SV), exact)


def _distribution(
    x_V: _Floats, temperature: float, top_k: int, top_p: float, min_p: float
) -> _Floats:
    """The probability of each token after every filter."""
    order_V = np.argsort(-x_V, kind="stable")
    p_V = np.exp((x_V - x_V.max()) / temperature)
    kept = order_V[p_V[order_V] >= min_p * p_V.max()][:top_k]
    mass = np.cumsum(p_V[kept]) / p_V[kept].sum()
    # A sum may miss p by its own rounding.
    kept = kept[: int(np.searchsorted(mass, top_p * (1 - 1e-12))) + 1]
    filtered_V: _Floats = np.zeros_like(p_V)
    filtered_V[kept] = p_V[kept] / p_V[kept].sum()
    return filtered_V


def _draw(
    size: int, spread: float, ties: bool, kernel: Call, runtime: CpuRuntime
) -> Iterator[Compared]:
    logits_SV = noise(_DRAWN_ROWS, size, dtype=torch.float32) * spread
    if ties:
        logits_SV = (logits_SV * 5 / spread).round() * spread / 5
    rows = np.arange(_DRAWN_ROWS)
    temperatures = np.take(_TEMPERATURES, rows, mode="wrap")
    top_ks = np.maximum(1, (np.take(_TOP_K_SHARES, rows // 2, mode="wrap") * size).astype(np.int64))
    top_ps = np.take(_TOP_PS, rows, mode="wrap")
    min_ps = np.take(_MIN_PS, rows, mode="wrap")
    uniforms = (rows + 0.5) / _DRAWN_ROWS
    tokens_S = kernel(
        logits_SV,
        torch.from_numpy(uniforms),
        temperatures_S=torch.from_numpy(temperatures),
        top_ks_S=torch.from_numpy(top_ks),
        top_ps_S=torch.from_numpy(top_ps),
        min_ps_S=torch.from_numpy(min_ps),
    )
    # Which token has a uniform number may turn on the rounding of weights, how far the number is
    # from the share of [0, 1] that its token has may not.
    away = np.zeros(_DRAWN_ROWS)
    for row, token in enumerate(tokens_S.tolist()):
        p_V = _distribution(
            logits_SV[row].double().numpy(),
            temperatures[row],
            int(top_ks[row]),
            top_ps[row],
            min_ps[row],
        )
        end = p_V[: token + 1].sum()
        away[row] = max(end - p_V[token] - uniforms[row], uniforms[row] - end, 0.0)
    yield Compared(what="tokens", error=float(away.max()))


def _lp(size: int, count: int, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    logits_SV = noise(5, size, dtype=torch.float32) * 5
    logits_SV[1] = (logits_SV[1] / 5).round()
    if size > 1:
        logits_SV[2, size // 2] = torch.nan
        logits_SV[3, size // 3] = -torch.inf
    tokens_S = (torch.arange(5) * 7919) % size
    numbers_SV = _numbers(logits_SV)
    lowest = float(torch.finfo(torch.float32).min)
    exact_SV = numbers_SV.log_softmax(-1).clamp(min=lowest)
    order_SV = numbers_SV.argsort(dim=-1, descending=True, stable=True)[:, :count]
    chosen_S, ids_SK, values_SK = kernel(logits_SV, tokens_S, count)
    exact_S = exact_SV.gather(1, tokens_S[:, None])[:, 0]
    yield compare("those of the tokens", chosen_S, exact_S, torch.float32)
    yield equal("ids of the likeliest", ids_SK, order_SV)
    exact_SK = exact_SV.gather(1, order_SV)
    yield compare("those of the likeliest", values_SK, exact_SK, torch.float32)


def _some_tokens(size: int, count: int) -> torch.Tensor:
    """Distinct tokens, the first and the last among them where there are so many."""
    apart = np.linspace(0, size - 1, count).astype(np.int64)
    return torch.from_numpy(np.unique(apart)[::-1].copy())


def _bias(size: int, count: int, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    logits_V = noise(size, dtype=torch.float32) * 5
    ids_N = _some_tokens(size, count)
    values_N = noise(len(ids_N), dtype=torch.float32, seed=1) * 30
    exact_V = logits_V.double()
    exact_V[ids_N] += values_N.double()
    kernel(logits_V, ids_N, values_N)
    yield compare("logits", logits_V, exact_V, torch.float32)


def _penalise(
    size: int, penalties: tuple[float, float, float], kernel: Call, runtime: CpuRuntime
) -> Iterator[Compared]:
    repetition, presence, frequency = penalties
    logits_V = noise(size, dtype=torch.float32) * 5
    seen_L = _some_tokens(size, min(size, 37))
    counts_L = (torch.arange(len(seen_L), dtype=torch.int32) * 7) % 31
    exact_V = logits_V.double()
    for token, count in zip(seen_L.tolist(), counts_L.tolist(), strict=True):
        logit = float(exact_V[token])
        logit = logit / repetition if logit > 0 else logit * repetition
        exact_V[token] = logit - presence * (count > 0) - frequency * count
    kernel(
        logits_V,
        seen_L,
        counts_L,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
    )
    yield compare("logits", logits_V, exact_V, torch.float32)


def _bitmask(size: int, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    allowed_SV = noise(4, size, dtype=torch.float32, seed=1) > 0
    logits_SV = noise(4, size, dtype=torch.float32)
    words = -(-size // 32)
    bits = np.zeros((4, words * 32), dtype=np.uint8)
    bits[:, :size] = allowed_SV.numpy()
    packed = np.packbits(bits, axis=-1, bitorder="little").view("<i4").astype(np.int32)
    exact_SV = logits_SV.masked_fill(~allowed_SV, -torch.inf)
    kernel(logits_SV, torch.from_numpy(packed))
    yield equal("logits", logits_SV, exact_SV)
