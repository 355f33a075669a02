"""Sampling said again as plainly as can be: float64, sorts, one row, no regard for cost."""

import numpy as np
import torch

from tokenspeed.core.sampling import SamplingParams

__all__ = ["distribution"]


def distribution(
    logits: torch.Tensor,
    params: SamplingParams,
    *,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
) -> np.ndarray:
    """The probability of each token, after every filter."""
    x = logits.numpy().astype(np.float64).copy()
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in {*(prompt or ()), *(output or ())}:
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token in output or ():
        x[token] -= params.frequency_penalty
    for token in set(output or ()):
        x[token] -= params.presence_penalty
    order = np.argsort(-x, kind="stable")
    if params.greedy:
        return np.eye(len(x))[order[0]]
    p = np.exp((x - x.max()) / params.temperature)
    kept = [token for token in order if p[token] >= params.min_p * p.max()]
    kept = kept[: params.top_k]
    mass = p[kept] / p[kept].sum()
    reached = int(np.searchsorted(np.cumsum(mass), params.top_p * (1 - 1e-12))) + 1
    kept = kept[:reached]
    filtered = np.zeros_like(p)
    filtered[kept] = p[kept]
    return filtered / filtered.sum()
