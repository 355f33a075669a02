"""Sampling in PyTorch, on any device: the numerics oracle.

Every inexact operation works on one row alone and on memory of its own, so a row's token does not
depend on which rows lie beside it. The likelier of two tokens is the one with the greater logit,
and on equal logits the one with the lower id. NaN counts as minus infinity, and plus infinity as
the greatest finite logit.

Legend: S rows, V vocabulary, N tokens still possible or with a bias, K likeliest tokens, L tokens
seen, B blocks of tokens, W 32-bit words that hold V bits.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tokenspeed.kernels.registry import Priority, kernel

__all__ = ["add_bias", "apply_bitmask", "argmax", "draw", "logprobs", "penalise"]

# Tokens whose sum or maximum is taken at once; a level between the row and the token.
BLOCK = 64
# Tokens that are sorted rather than told apart by one more pass over the vocabulary.
SORTED_MAX = 4096
# exp of it is about the least normal float32.
LEAST_EXPONENT = -87.0
# Each pass halves the range, on a logarithmic scale, in which the nucleus may end. This many leave
# a range in which the probability changes by less than a hundredth.
PASSES_MAX = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scratch:
    """Memory for one row at a time."""

    weights_V: torch.Tensor
    spare_V: torch.Tensor


@kernel("sampling.argmax", solution="reference", formats=("float32",), priority=Priority.REFERENCE)
def argmax(logits_SV: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row."""
    tokens_S = logits_SV.argmax(dim=-1)
    # torch lets NaN win, so a winner that is a number clears its whole row.
    peaks_S = logits_SV.gather(1, tokens_S[:, None])[:, 0]
    for row in peaks_S.isnan().nonzero()[:, 0].tolist():
        tokens_S[row] = _numbers_and_peak(logits_SV[row])[0].argmax()
    return tokens_S


@kernel("sampling.draw", solution="reference", formats=("float32",), priority=Priority.REFERENCE)
def draw(
    logits_SV: torch.Tensor,
    uniforms_S: torch.Tensor,
    *,
    temperatures_S: torch.Tensor,
    top_ks_S: torch.Tensor,
    top_ps_S: torch.Tensor,
    min_ps_S: torch.Tensor,
) -> torch.Tensor:
    """A token of each row: temperature, min-p, top-k, top-p, then the inverse of the
    distribution function over the tokens that are left, in ascending order of id.
    """
    columns = (uniforms_S, temperatures_S, top_ks_S, top_ps_S, min_ps_S)
    rows = zip(logits_SV, *(column.tolist() for column in columns), strict=True)
    # Fresh memory of a vocabulary's size costs more than a pass over it, so all rows share this.
    scratch = _Scratch(
        weights_V=logits_SV.new_empty(logits_SV.shape[1]),
        spare_V=logits_SV.new_empty(logits_SV.shape[1]),
    )
    tokens = [
        _draw_row(
            row_V,
            uniform,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            scratch=scratch,
        )
        for row_V, uniform, temperature, top_k, top_p, min_p in rows
    ]
    return torch.tensor(tokens, dtype=torch.int64, device=logits_SV.device)


@kernel(
    "sampling.logprobs", solution="reference", formats=("float32",), priority=Priority.REFERENCE
)
def logprobs(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability of a token of each row, and the `count` likeliest with theirs."""
    lowest = torch.finfo(logits_SV.dtype).min
    chosen, ids, values = [], [], []
    for row_V, token in zip(logits_SV, tokens_S, strict=True):
        logits_V, peak = _numbers_and_peak(row_V)
        peak = peak.clamp_min(lowest)
        mass = (logits_V - peak).exp_().sum(dtype=torch.float64)
        # A row without a possible token has no mass, and its logarithm must still be a number.
        log_mass = mass.clamp_min(math.ulp(0.0)).log().to(logits_V.dtype)
        ids_K = _likeliest(logits_V, count)
        ids.append(ids_K)
        # Impossible tokens get the lowest number, which every format can carry.
        values.append((logits_V[ids_K] - peak - log_mass).clamp_min(lowest))
        chosen.append((logits_V[token] - peak - log_mass).clamp_min(lowest))
    return torch.stack(chosen), torch.stack(ids), torch.stack(values)


@kernel(
    "sampling.penalise", solution="reference", formats=("float32",), priority=Priority.REFERENCE
)
def penalise(
    logits_V: torch.Tensor,
    seen_L: torch.Tensor,
    output_counts_L: torch.Tensor,
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Make the tokens seen less likely, in place."""
    seen = logits_V[seen_L]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= frequency * output_counts_L + presence * (output_counts_L > 0)
    logits_V[seen_L] = seen


@kernel(
    "sampling.add_bias", solution="reference", formats=("float32",), priority=Priority.REFERENCE
)
def add_bias(logits_V: torch.Tensor, ids_N: torch.Tensor, values_N: torch.Tensor) -> None:
    """Add to the logits of some tokens, in place."""
    logits_V.index_add_(0, ids_N, values_N)


@kernel(
    "sampling.apply_bitmask",
    solution="reference",
    formats=("float32",),
    priority=Priority.REFERENCE,
)
def apply_bitmask(logits_SV: torch.Tensor, bitmask_SW: torch.Tensor) -> None:
    """Exclude the tokens whose bit is not set, in place."""
    bits = torch.arange(32, dtype=torch.int32, device=bitmask_SW.device)
    allowed = ((bitmask_SW[:, :, None] >> bits) & 1).bool().flatten(1)
    logits_SV.masked_fill_(~allowed[:, : logits_SV.shape[1]], -math.inf)


def _draw_row(
    row_V: torch.Tensor,
    uniform: float,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    scratch: _Scratch,
) -> int:
    logits, peak = _numbers_and_peak(row_V)
    if peak == -math.inf:
        return 0
    ids: torch.Tensor | None = None
    if top_k < len(row_V):
        # Both keep the likeliest tokens down to some point, so top-k may go before min-p, which
        # then needs no pass over the vocabulary.
        ids = _likeliest(logits, top_k).sort().values
        logits = logits[ids]
    # Below the least normal number a division would lose the peak, which is 0 / temperature.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    scaled = torch.sub(logits, peak, out=scratch.weights_V[: len(logits)]).div_(temperature)
    if min_p > 0.0:
        kept = (scaled >= math.log(min_p)).nonzero()[:, 0]
        ids = kept if ids is None else ids[kept]
        scaled = scaled[kept]
    # Arithmetic on subnormal numbers is slow, and tokens that unlikely are never drawn.
    weights = torch.threshold_(scaled, LEAST_EXPONENT, -math.inf).exp_()
    if top_p < 1.0:
        _keep_nucleus(weights, top_p, scratch.spare_V)
    index = _inverse_cdf(weights, uniform)
    return index if ids is None else int(ids[index])


def _numbers_and_peak(row_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The row without NaN and plus infinity, and its greatest logit."""
    peak = row_V.max()
    # The greatest of a row with either is not finite, so most rows cost one pass.
    if peak.isfinite():
        return row_V, peak
    limit = torch.finfo(row_V.dtype).max
    logits_V = row_V.nan_to_num(nan=-math.inf, posinf=limit, neginf=-math.inf)
    return logits_V, logits_V.max()


def _likeliest(logits_V: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` likeliest tokens, the likeliest first.

    At least `count` tokens reach the count-th greatest of the blocks' maxima, so no other token
    can be among the `count` likeliest: one pass for the maxima and one to compare leave few.
    """
    size = len(logits_V)
    blocks = size // BLOCK
    if count <= blocks:
        peaks_B = logits_V[: blocks * BLOCK].view(blocks, BLOCK).amax(dim=1)
        bound = peaks_B.topk(count).values[-1] if count else math.inf
    else:
        bound = logits_V.topk(min(count, size)).values[-1]
    # Ids ascend here, and a stable sort keeps them so among equals.
    ids_N = (logits_V >= bound).nonzero()[:, 0]
    return ids_N[logits_V[ids_N].argsort(descending=True, stable=True)[:count]]


def _keep_nucleus(weights_N: torch.Tensor, top_p: float, spare_V: torch.Tensor) -> None:
    """Zero all but the fewest tokens, the likeliest first, whose weights reach `top_p` of the sum.

    The weight at which the nucleus ends is bracketed by bisection before anything is sorted, so
    a flat distribution costs passes over the vocabulary, and a peaked one a pass and a small sort.
    """

    spare_N = spare_V[: len(weights_N)]

    def mass_above(bound: float) -> float:
        torch.threshold(weights_N, bound, 0.0, out=spare_N)
        return float(spare_N.sum(dtype=torch.float64))

    total = mass_above(0.0)
    needed = top_p * total
    # The tokens up to `low` hold less than 1 - top_p even if all have that weight. The nucleus
    # ends at a weight above `low` and not above `high`.
    high, above_high = weights_N.max().item(), 0.0
    low = max((1.0 - top_p) * total / (2 * len(weights_N)), torch.finfo(weights_N.dtype).tiny)
    for _ in range(PASSES_MAX if len(weights_N) > SORTED_MAX else 0):
        # No more than this many tokens can have a greater weight.
        if total / low <= SORTED_MAX:
            break
        middle = math.sqrt(low * high)
        above = mass_above(middle)
        if above >= needed:
            low = middle
        else:
            high, above_high = middle, above
    ids = ((weights_N > low) & (weights_N <= high)).nonzero()[:, 0]
    inside = weights_N[ids]
    ranked = inside.sort(descending=True).values
    sums = ranked.cumsum(0, dtype=torch.float64)
    last = min(int(torch.searchsorted(sums, needed - above_high)), len(ranked) - 1)
    cutoff = ranked[last]
    ties_kept = int((ranked[: last + 1] == cutoff).sum())
    torch.threshold_(weights_N, cutoff.nextafter(cutoff.new_zeros(())).item(), 0.0)
    weights_N[ids[inside == cutoff][ties_kept:]] = 0.0


def _inverse_cdf(weights_N: torch.Tensor, uniform: float) -> int:
    """The first index at which the running sum exceeds `uniform` of the whole.

    The running sum goes over blocks and then within one, so that it is one pass of plain sums
    over the vocabulary and two short scans.
    """
    weights_BN = F.pad(weights_N, (0, -len(weights_N) % BLOCK)).view(-1, BLOCK)
    sums_B = weights_BN.sum(dim=1).double().cumsum(0)
    target = uniform * sums_B[-1].item()
    block = _first_above(sums_B, target)
    before = sums_B[block - 1].item() if block else 0.0
    return block * BLOCK + _first_above(weights_BN[block].double().cumsum(0), target - before)


def _first_above(sums: torch.Tensor, target: float) -> int:
    # Rounding may put the target on the last sum; the token that reaches that sum is then meant.
    target = min(target, math.nextafter(sums[-1].item(), 0.0))
    return int(torch.searchsorted(sums, target, right=True))
