"""Mixtures of experts of native weights: all experts of a step in one call, which can be recorded.

A token's result is the same bits in any batch: each product's rows are, a token's experts are added
up in their order, and it is not rounded to bytes beside others.

Legend: T tokens, M model features, E experts, K experts of a token, F features of an expert.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.ops.moe import ExpertMatrices
from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.registry import Priority, kernel
from tokenspeed.kernels.weights import GROUPED, PACKED, PANELS

__all__ = ["add", "experts", "route"]

_CPU = Capability(device="cpu")
_TYPES = ("float32", "bfloat16")


@kernel("moe.route", solution="cpu", requires=_CPU, formats=_TYPES, priority=Priority.NATIVE)
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
    runtime: CpuRuntime,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token; scores are float32, of exponentials and sums in double precision."""
    experts_TK = torch.empty((len(logits_TE), count), dtype=torch.int64)
    weights_TK = torch.empty((len(logits_TE), count))
    bias_E = None if bias_E is None else bias_E.float()
    _cpu.route(
        runtime,
        logits_TE,
        bias_E,
        scoring,
        normalise,
        scale,
        groups,
        groups_kept,
        experts_TK,
        weights_TK,
    )
    return experts_TK, weights_TK


@kernel(
    "moe.experts",
    solution="cpu",
    requires=_CPU,
    formats=(PACKED, *GROUPED, *PANELS),
    priority=Priority.NATIVE,
)
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
    runtime: CpuRuntime,
) -> torch.Tensor:
    """Tokens are gathered by expert; then each of two products is one job over all experts that
    have some. Only these are read: of few tokens no more than K each."""
    assert not isinstance(gate_up_E2FM, torch.Tensor | QuantisedWeight)
    assert not isinstance(down_EMF, torch.Tensor | QuantisedWeight)
    out_TM = x_TM.new_empty(x_TM.shape)
    _cpu.experts(
        runtime,
        x_TM,
        [weight.matrices for weight in gate_up_E2FM],
        [weight.matrices for weight in down_EMF],
        gate_up_bias_E2F,
        down_bias_EM,
        experts_TK,
        weights_TK,
        first,
        limit,
        out_TM,
    )
    return out_TM


@kernel("moe.add", solution="cpu", requires=_CPU, formats=_TYPES, priority=Priority.NATIVE)
def add(a_TM: torch.Tensor, b_TM: torch.Tensor, *, runtime: CpuRuntime) -> torch.Tensor:
    """One pass in float32, rounded once."""
    out_TM = a_TM.new_empty(a_TM.shape)
    _cpu.add(runtime, a_TM, b_TM, out_TM)
    return out_TM
