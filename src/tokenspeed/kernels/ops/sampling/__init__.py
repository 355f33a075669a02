"""Owns the declarations of sampling from logits; never computes one.

Of two tokens the likelier is the one with the greater logit, and on equal logits the one with the
lower id. NaN counts as minus infinity, and plus infinity as the greatest finite logit. A row's
result never depends on another row.

Legend: S rows, V vocabulary, K likeliest tokens, L tokens seen, N tokens with a bias, W 32-bit
words of V bits.
"""

import torch

from tokenspeed.kernels.registry import declare_op

__all__ = ["add_bias", "apply_bitmask", "argmax", "draw", "logprobs", "penalise"]


@declare_op("sampling.argmax")
def argmax(logits_SV: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row, int64 [S]; 0 where no token is possible."""
    return argmax.best(logits_SV)(logits_SV)


@declare_op("sampling.draw")
def draw(
    logits_SV: torch.Tensor,
    uniforms_S: torch.Tensor,
    *,
    temperatures_S: torch.Tensor,
    top_ks_S: torch.Tensor,
    top_ps_S: torch.Tensor,
    min_ps_S: torch.Tensor,
) -> torch.Tensor:
    """A token of each row, int64 [S]; 0 where no token is possible.

    In this order: logits are divided by the temperature; min-p keeps tokens at least `min_p` as
    likely as the likeliest; top-k the k likeliest of those; top-p the fewest of those, likeliest
    first, whose probabilities reach p once they are scaled to sum to 1. The token drawn is the
    first, in ascending order of id over what is left, at which the running sum of probabilities
    exceeds the row's uniform number.

    Args:
        logits_SV: float32.
        uniforms_S: float64 on the host, inside (0, 1).
        temperatures_S: float64 on the host, above 0.
        top_ks_S: int64 on the host; V or more keeps all.
        top_ps_S: float64 on the host, in (0, 1]; 1 keeps all.
        min_ps_S: float64 on the host, in [0, 1]; 0 keeps all.
    """
    return draw.best(logits_SV)(
        logits_SV,
        uniforms_S,
        temperatures_S=temperatures_S,
        top_ks_S=top_ks_S,
        top_ps_S=top_ps_S,
        min_ps_S=min_ps_S,
    )


@declare_op("sampling.logprobs")
def logprobs(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities under softmax(logits), never below the least finite float32.

    Args:
        logits_SV: float32.
        tokens_S: int64; a token of each row.
        count: K, at most V.

    Returns:
        float32 [S] of `tokens_S`; int64 [S, K] ids of the likeliest tokens, the likeliest first;
        float32 [S, K] theirs.
    """
    return logprobs.best(logits_SV)(logits_SV, tokens_S, count)


@declare_op("sampling.penalise")
def penalise(
    logits_V: torch.Tensor,
    seen_L: torch.Tensor,
    output_counts_L: torch.Tensor,
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Make the tokens seen less likely, in place.

    First the repetition penalty divides positive and multiplies negative logits of all of them
    (Keskar et al. 2019, section 4.1); then tokens that occur in the output lose `presence` once
    and `frequency` per occurrence.

    Args:
        logits_V: float32, one row.
        seen_L: int64, distinct tokens of the prompt and output.
        output_counts_L: int32, how often each occurs in the output.
        repetition: above 0; 1 changes nothing.
        presence, frequency: 0 changes nothing.
    """
    penalise.best(logits_V)(
        logits_V,
        seen_L,
        output_counts_L,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
    )


@declare_op("sampling.add_bias")
def add_bias(logits_V: torch.Tensor, ids_N: torch.Tensor, values_N: torch.Tensor) -> None:
    """Add to the logits of some tokens, in place.

    Args:
        logits_V: float32, one row.
        ids_N: int64, distinct tokens.
        values_N: float32, what is added to each.
    """
    add_bias.best(logits_V)(logits_V, ids_N, values_N)


@declare_op("sampling.apply_bitmask")
def apply_bitmask(logits_SV: torch.Tensor, bitmask_SW: torch.Tensor) -> None:
    """Set the logits of excluded tokens to minus infinity, in place.

    Args:
        logits_SV: float32.
        bitmask_SW: int32; token v is allowed where bit v % 32 of word v // 32 is set.
    """
    apply_bitmask.best(logits_SV)(logits_SV, bitmask_SW)
