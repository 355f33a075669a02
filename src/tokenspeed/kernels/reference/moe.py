"""Mixtures of experts, one expert after the other.

Legend: T tokens, N tokens of one expert, M model features, E experts, K experts of a token,
F features of an expert, G groups of experts.
"""

import torch
import torch.nn.functional as F

from tokenspeed.kernels.ops.moe import GATE_SLOPE
from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.registry import ANY, Priority, kernel

__all__ = ["add", "experts", "route"]


@kernel("moe.add", solution="reference", formats=ANY, priority=Priority.REFERENCE)
def add(a_TM: torch.Tensor, b_TM: torch.Tensor) -> torch.Tensor:
    """The sum."""
    return a_TM + b_TM


@kernel("moe.route", solution="reference", formats=ANY, priority=Priority.REFERENCE)
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
    """The formulas."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE
    if scoring == "softmax":
        scores_TE = logits_TE.softmax(-1)
    elif scoring == "sigmoid":
        # PyTorch's sigmoid has another last bit where a tensor ends than within it, so a token's
        # would depend on the tokens beside it. Its softmax goes row by row.
        both_TE2 = torch.stack((logits_TE, torch.zeros_like(logits_TE)), dim=-1)
        scores_TE = both_TE2.softmax(-1)[..., 0]
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E.float()
    if groups > 1:
        grouped_TGE = choice_TE.view(len(choice_TE), groups, -1)
        best = 1 if bias_E is None else min(2, grouped_TGE.shape[-1])
        worth_TG = grouped_TGE.topk(best, dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
        kept_TG.scatter_(1, _first(worth_TG, groups_kept), True)
        choice_TE = grouped_TGE.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)
    experts_TK = _first(choice_TE, count)
    weights_TK = scores_TE.gather(1, experts_TK)
    if scoring == "chosen":
        weights_TK = weights_TK.softmax(-1)
    if normalise:
        # What is added keeps a token whose scores are all zero from becoming NaN.
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return experts_TK, weights_TK * scale


@kernel(
    "moe.experts",
    solution="reference",
    formats=DENSE,
    priority=Priority.REFERENCE,
    batch_dependent=True,
)
def experts(
    x_TM: torch.Tensor,
    gate_up_E2FM: torch.Tensor,
    down_EMF: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    first: int,
    gate_up_bias_E2F: torch.Tensor | None = None,
    down_bias_EM: torch.Tensor | None = None,
    limit: float | None = None,
) -> torch.Tensor:
    """Two products an expert that has tokens."""
    out_TM = torch.zeros(x_TM.shape, dtype=torch.float32, device=x_TM.device)
    for index, (gate_up_2FM, down_MF) in enumerate(zip(gate_up_E2FM, down_EMF, strict=True)):
        tokens_N, places_N = torch.where(experts_TK == first + index)
        if len(tokens_N):
            bias_2F = None if gate_up_bias_E2F is None else gate_up_bias_E2F[index]
            both_N2F = F.linear(x_TM[tokens_N], gate_up_2FM, bias_2F).float()
            bias_M = None if down_bias_EM is None else down_bias_EM[index]
            found_NM = F.linear(_gated(both_N2F, limit).to(x_TM.dtype), down_MF, bias_M).float()
            out_TM.index_add_(0, tokens_N, found_NM * weights_TK[tokens_N, places_N, None])
    return out_TM.to(x_TM.dtype)


def _gated(both_N2F: torch.Tensor, limit: float | None) -> torch.Tensor:
    gate_NF, up_NF = both_N2F.chunk(2, dim=-1)
    if limit is None:
        return F.silu(gate_NF) * up_NF
    gate_NF, up_NF = gate_NF.clamp(max=limit), up_NF.clamp(-limit, limit)
    return gate_NF * torch.sigmoid(GATE_SLOPE * gate_NF) * (up_NF + 1)


def _first(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the greatest scores of each row; of equal ones the first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
