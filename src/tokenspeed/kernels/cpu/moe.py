"""Mixtures of experts of packed weights: the products of `gemm.linear`, one expert at a time.

A token's result is the same bits in any batch, because each product's is.

Legend: T tokens, N tokens of one expert, M model features, E experts, K experts of a token,
F features of an expert.
"""

import torch

from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.activation import silu_and_mul
from tokenspeed.kernels.cpu.gemm import linear
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.ops.moe import ExpertMatrices
from tokenspeed.kernels.registry import Priority, kernel
from tokenspeed.kernels.weights import PACKED, PANELS

__all__ = ["experts"]


@kernel(
    "moe.experts",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=(PACKED, *PANELS),
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
    runtime: CpuRuntime,
) -> torch.Tensor:
    """Only experts that have tokens are read: of few tokens no more than K each."""
    assert not isinstance(gate_up_E2FM, torch.Tensor)
    assert not isinstance(down_EMF, torch.Tensor)
    out_TM = torch.zeros(x_TM.shape)
    for expert in sorted(set(experts_TK.flatten().tolist())):
        if not first <= expert < first + len(gate_up_E2FM):
            continue
        tokens_N, places_N = torch.where(experts_TK == expert)
        hidden_N2F = linear(x_TM[tokens_N], gate_up_E2FM[expert - first], None, runtime=runtime)
        hidden_NF = silu_and_mul(hidden_N2F, runtime=runtime)
        found_NM = linear(hidden_NF, down_EMF[expert - first], None, runtime=runtime).float()
        out_TM.index_add_(0, tokens_N, found_NM * weights_TK[tokens_N, places_N, None])
    return out_TM.to(x_TM.dtype)
