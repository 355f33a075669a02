"""Angles of the rotary position embedding, computed once per step for all layers.

Legend: T tokens, E pairs of elements of a head.
"""

import math
from typing import NamedTuple

import torch

from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.modeling.config import RopeConfig
from tokenspeed.modeling.module import Module

__all__ = ["Angles", "RotaryEmbedding", "rotary_order"]


class Angles(NamedTuple):
    """Cosine and sine of every token's angles, float32."""

    cos_TE: torch.Tensor
    sin_TE: torch.Tensor


class RotaryEmbedding(Module):
    """Angle e of position p is p times frequency e (RoFormer, Su et al. 2021, section 3.2).

    Frequencies and products are float32, as where these models were trained. Elements that a model
    does not rotate have a frequency of zero, which turns nothing, and stand as `rotary_order` says.

    Args:
        rope: base and scaling of the frequencies.
        head_dim: 2 E.
        kernels: chooses the op.
    """

    def __init__(self, rope: RopeConfig, *, head_dim: int, kernels: KernelSelector) -> None:
        rotated = rope.rotated(head_dim)
        frequencies_E = torch.zeros(head_dim // 2, device="cpu")
        frequencies_E[: rotated // 2] = _frequencies(rope, rotated)
        self._frequencies_E = frequencies_E.to(torch.get_default_device())
        self._length = rope.length
        self._angles = kernels.select(ops.rope.angles, format_name="float32")

    def forward(self, positions_T: torch.Tensor) -> Angles:
        """Angles of int64 positions."""
        return Angles(*self._angles(positions_T, self._frequencies_E, self._length))


def rotary_order(head_dim: int, rotated: int) -> tuple[int, ...]:
    """How elements of a head are kept so that one rotation of whole heads serves.

    The op pairs element i with element i + D/2. Of the leading elements that are rotated the first
    half comes first in the head, and the second first in its second half; the others follow each.
    Products of queries and keys do not change when both are kept so.

    Args:
        head_dim: D.
        rotated: leading elements of a head that are rotated.
    """
    half, rest = rotated // 2, (head_dim - rotated) // 2
    return (
        *range(half),
        *range(rotated, rotated + rest),
        *range(half, rotated),
        *range(rotated + rest, head_dim),
    )


def _frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    # On the host, where every device's bits are the same; on the meta device arithmetic would load
    # half of torch's compiler, which takes a second or two.
    exponents_E = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies_E = 1.0 / rope.theta**exponents_E
    if rope.type == "linear":
        return frequencies_E / rope.factor
    if rope.type == "llama3":
        return _llama3(frequencies_E, rope)
    if rope.type == "yarn":
        return _yarn(frequencies_E, rope)
    return frequencies_E


def _llama3(frequencies_E: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    # Turns a pair makes over the original context. Few turns: never seen whole in training, so
    # slowed by the factor. Many: kept. Between them, a straight line from one to the other.
    turns_E = rope.original_context * frequencies_E / (2 * math.pi)
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    kept_E = ((turns_E - low) / (high - low)).clamp(0.0, 1.0)
    return kept_E * frequencies_E + (1 - kept_E) * frequencies_E / rope.factor


def _yarn(frequencies_E: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    # YaRN (Peng et al. 2023, section 3.2): as llama3's, but the straight line is one over pairs and
    # not over turns. Its ends are the pairs that make the most turns and the fewest.
    pairs = len(frequencies_E)

    def place(turns: float) -> float:
        longest = rope.original_context / (2 * math.pi * turns)
        return pairs * math.log(longest) / math.log(rope.theta)

    first, last = place(rope.high_frequency_factor), place(rope.low_frequency_factor)
    if rope.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001
    pairs_E = torch.arange(pairs, dtype=torch.float32, device="cpu")
    slowed_E = ((pairs_E - first) / (last - first)).clamp(0.0, 1.0)
    return (1 - slowed_E) * frequencies_E + slowed_E * frequencies_E / rope.factor
