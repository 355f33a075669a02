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
from tokenspeed.kernels.ops.moe import GATE_SLOPE, ExpertMatrices
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
    gate_up_bias_E2F: torch.Tensor | None = None,
    down_bias_EM: torch.Tensor | None = None,
    limit: float | None = None,
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
        index = expert - first
        bias_2F = None if gate_up_bias_E2F is None else gate_up_bias_E2F[index]
        bias_M = None if down_bias_EM is None else down_bias_EM[index]
        hidden_N2F = linear(x_TM[tokens_N], gate_up_E2FM[index], bias_2F, runtime=runtime)
        if limit is None:
            hidden_NF = silu_and_mul(hidden_N2F, runtime=runtime)
        else:
            hidden_NF = _limited(hidden_N2F, limit, runtime)
        found_NM = linear(hidden_NF, down_EMF[index], bias_M, runtime=runtime).float()
        out_TM.index_add_(0, tokens_N, found_NM * weights_TK[tokens_N, places_N, None])
    return out_TM.to(x_TM.dtype)


def _limited(both_N2F: torch.Tensor, limit: float, runtime: CpuRuntime) -> torch.Tensor:
    """g * sigmoid(a g) is silu(a g) / a, of which there is a native one."""
    gate_NF, up_NF = both_N2F.float().chunk(2, dim=-1)
    scaled_N2F = torch.cat(
        (gate_NF.clamp(max=limit) * GATE_SLOPE, (up_NF.clamp(-limit, limit) + 1) / GATE_SLOPE),
        dim=-1,
    )
    hidden_NF = silu_and_mul(scaled_N2F, runtime=runtime)
    return hidden_NF.to(both_N2F.dtype)
