"""Owns the declarations of mixtures of experts; never computes one.

Legend: T tokens, M model features, E experts (of this rank, where a weight is meant), K experts of
a token, F features of an expert, G groups of experts.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.registry import declare_op
from tokenspeed.kernels.weights import Matrix, PackedGroups, PackedWeight

__all__ = ["GATE_SLOPE", "ExpertMatrices", "add", "experts", "route"]

GATE_SLOPE = 1.702
"""What the gate of experts with a limit is multiplied by within its sigmoid."""

ExpertMatrices: TypeAlias = (
    torch.Tensor | QuantisedWeight | Sequence[PackedWeight] | Sequence[PackedGroups]
)
"""A matrix of each expert: a tensor [E, outputs, inputs], one weight of all experts' outputs, or
packed ones in order."""


@declare_op("moe.route")
def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    count: int,
    *,
    scoring: str,
    normalise: bool,
    scale: float,
    groups: int,
    groups_kept: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token, int64 [T, K], and their weights, float32 [T, K].

    Arithmetic is float32. Of equal scores the expert with the lower number comes first.

    Args:
        logits_TE: of all experts, whichever rank holds them.
        bias_E: added to scores when experts are chosen, not when they are weighed
            (DeepSeek-V3, section 2.1.2); None for none.
        count: K.
        scoring: "softmax" or "sigmoid" of the logits; or "chosen", a softmax over the logits of
            the chosen ones.
        normalise: whether weights are divided by their sum.
        scale: what weights are multiplied by at last.
        groups: G; experts come in equal groups, of which only the best are looked at
            (DeepSeek-V2, section 2.2.2). A group is as good as its best expert, or as the sum of
            its best two where there is a bias and it has two.
        groups_kept: how many groups are looked at.
    """
    return route.best(logits_TE)(
        logits_TE,
        bias_E,
        count,
        scoring=scoring,
        normalise=normalise,
        scale=scale,
        groups=groups,
        groups_kept=groups_kept,
    )


@declare_op("moe.experts")
def experts(
    x_TM: torch.Tensor,
    gate_up_E2FM: ExpertMatrices,
    down_EMF: ExpertMatrices,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    first: int,
    gate_up_bias_E2F: torch.Tensor | None = None,
    down_bias_EM: torch.Tensor | None = None,
    limit: float | None = None,
) -> torch.Tensor:
    """The weighed sum of down(silu(gate(x)) * up(x)) over each token's experts; gives out_TM.

    With a limit it is down(g * sigmoid(1.702 g) * (u + 1)), where g is gate(x), at most the limit,
    and u is up(x) between the limit and its negative (gpt-oss, 2025).

    The sum is float32, in the order of experts, and rounded once, to x's type. Experts that
    the matrices do not hold add nothing.

    Args:
        x_TM: tokens.
        gate_up_E2FM: gates, and ups below them.
        down_EMF: the second products.
        experts_TK: int64, as `route` gives them.
        weights_TK: float32, as `route` gives them.
        first: the number of the first expert that the matrices hold.
        gate_up_bias_E2F, down_bias_EM: what products add, of x's type; None for nothing.
        limit: see above; None for none.
    """
    weight: Matrix = (
        gate_up_E2FM
        if isinstance(gate_up_E2FM, torch.Tensor | QuantisedWeight)
        else gate_up_E2FM[0]
    )
    kernel = experts.best(x_TM, weight=weight)
    return kernel(
        x_TM,
        gate_up_E2FM,
        down_EMF,
        experts_TK,
        weights_TK,
        first=first,
        gate_up_bias_E2F=gate_up_bias_E2F,
        down_bias_EM=down_bias_EM,
        limit=limit,
    )


@declare_op("moe.add")
def add(a_TM: torch.Tensor, b_TM: torch.Tensor) -> torch.Tensor:
    """a + b, of one type, such as what routed experts and shared ones give; rounded once."""
    return add.best(a_TM)(a_TM, b_TM)
