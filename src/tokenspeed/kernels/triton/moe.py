"""Mixtures of experts.

Legend: T tokens, M model features, E experts, K experts of a token, F features of an expert,
G groups of experts, N pairs of a token and an expert.
"""

import torch

from tokenspeed.kernels.ops.moe import ExpertMatrices
from tokenspeed.kernels.quantised import FLOAT4_GROUPS, FLOAT8_BLOCKS, INT4_GROUPS
from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.triton.expert_products import (
    HIGH_TILE,
    LOW_TILE,
    ExpertMatrix,
    Pairs,
    down,
    gate_up,
)
from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.quantised import FLOAT8_GPU
from tokenspeed.kernels.triton.registration import DENSE, next_power_of_2, triton_kernel

__all__ = [
    "experts",
    "experts_fixed",
    "experts_float8",
    "experts_float8_fixed",
    "route",
]

_device = DeviceCode("moe")
_PAIRS_BLOCK = 1024
_COMBINED_BLOCK = 1024
# Results of all pairs are kept before they are summed: 0.5 GB for 8 experts of 7,168 features.
_TOKENS_AT_ONCE = 2048


@triton_kernel("moe.route")
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
    """A program for each token; experts are chosen one after the other."""
    tokens, total = logits_TE.shape
    experts_TK = torch.empty((tokens, count), dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty((tokens, count), dtype=torch.float32, device=logits_TE.device)
    if tokens:
        size = total // groups
        _device.route[(tokens,)](
            logits_TE,
            bias_E,
            experts_TK,
            weights_TK,
            count,
            size,
            groups,
            groups_kept,
            logits_TE.stride(0),
            scale,
            SCORING=scoring,
            HAS_BIAS=bias_E is not None,
            NORMALISES=normalise,
            G=next_power_of_2(groups),
            E=next_power_of_2(size),
            K=next_power_of_2(count),
            num_warps=1 if total <= 128 else 4,
        )
    return experts_TK, weights_TK


@triton_kernel("moe.experts", formats=(*DENSE, INT4_GROUPS, FLOAT4_GROUPS), batch_dependent=True)
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
    """Pairs in the order of experts, two products over tiles of them, and a sum for each token.

    How many pairs an expert has stays on the device: grids are as large as they can be needed, and
    a captured step may be run again for other tokens.
    """
    # As high as experts have pairs, on the average.
    held = _matrix(down_EMF, x_TM.shape[1])[1]
    high = experts_TK.numel() >= HIGH_TILE // 2 * held
    return _experts(
        x_TM,
        gate_up_E2FM,
        down_EMF,
        experts_TK,
        weights_TK,
        first=first,
        gate_up_bias_E2F=gate_up_bias_E2F,
        down_bias_EM=down_bias_EM,
        limit=limit,
        height=HIGH_TILE if high else LOW_TILE,
    )


@triton_kernel("moe.experts", formats=(*DENSE, INT4_GROUPS, FLOAT4_GROUPS))
def experts_fixed(
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
    """The same with tiles of one height, however many tokens there are."""
    return _experts(
        x_TM,
        gate_up_E2FM,
        down_EMF,
        experts_TK,
        weights_TK,
        first=first,
        gate_up_bias_E2F=gate_up_bias_E2F,
        down_bias_EM=down_bias_EM,
        limit=limit,
        height=LOW_TILE,
    )


@triton_kernel("moe.experts", formats=(FLOAT8_BLOCKS,), requires=FLOAT8_GPU, batch_dependent=True)
def experts_float8(
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
    """As `experts`; what goes into a product is rounded to FP8 first."""
    return experts(
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


@triton_kernel("moe.experts", formats=(FLOAT8_BLOCKS,), requires=FLOAT8_GPU)
def experts_float8_fixed(
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
    """As `experts_fixed`; what goes into a product is rounded to FP8 first."""
    return experts_fixed(
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


def _experts(
    x_TM: torch.Tensor,
    gate_up_E2FM: ExpertMatrices,
    down_EMF: ExpertMatrices,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    first: int,
    gate_up_bias_E2F: torch.Tensor | None,
    down_bias_EM: torch.Tensor | None,
    limit: float | None,
    height: int,
) -> torch.Tensor:
    out_TM = x_TM.new_empty(x_TM.shape)
    down_matrix, held = _matrix(down_EMF, x_TM.shape[1])
    features = down_matrix.shape[-1]
    gate_up_matrix, _ = _matrix(gate_up_E2FM, 2 * features)
    for start in range(0, len(x_TM), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        _some_tokens(
            x_TM[part],
            gate_up_matrix,
            down_matrix,
            experts_TK[part].contiguous(),
            weights_TK[part].contiguous(),
            out_TM=out_TM[part],
            first=first,
            held=held,
            gate_up_bias_E2F=gate_up_bias_E2F,
            down_bias_EM=down_bias_EM,
            limit=limit,
            height=height,
        )
    return out_TM


def _some_tokens(
    x_TM: torch.Tensor,
    gate_up_matrix: ExpertMatrix,
    down_matrix: ExpertMatrix,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    out_TM: torch.Tensor,
    first: int,
    held: int,
    gate_up_bias_E2F: torch.Tensor | None,
    down_bias_EM: torch.Tensor | None,
    limit: float | None,
    height: int,
) -> None:
    tokens, per_token = experts_TK.shape
    outputs, features = x_TM.shape[1], down_matrix.shape[-1]
    device, pairs = x_TM.device, tokens * per_token
    if x_TM.stride(-1) != 1:
        x_TM = x_TM.contiguous()
    counts_E = torch.empty(held, dtype=torch.int32, device=device)
    order_N = torch.empty(pairs, dtype=torch.int32, device=device)
    block = min(_PAIRS_BLOCK, next_power_of_2(pairs))
    room = next_power_of_2(held)
    _device.count_pairs[(held,)](experts_TK, counts_E, pairs, first, BLOCK=block, num_warps=4)
    _device.place_pairs[(held,)](
        experts_TK, counts_E, order_N, pairs, first, held, E=room, BLOCK=block, num_warps=4
    )
    in_order = Pairs(
        order_N=order_N, counts_E=counts_E, per_token=per_token, room=room, height=height
    )
    hidden_NF = gate_up(
        x_TM, gate_up_matrix, gate_up_bias_E2F, in_order, features=features, limit=limit
    )
    found_NM = down(hidden_NF, down_matrix, down_bias_EM, in_order, weights_TK, outputs=outputs)
    block = min(_COMBINED_BLOCK, next_power_of_2(outputs))
    _device.combine[(tokens, -(-outputs // block))](
        found_NM,
        experts_TK,
        out_TM,
        outputs,
        per_token,
        first,
        held,
        K=next_power_of_2(per_token),
        BLOCK=block,
        num_warps=4,
    )


def _matrix(weight: ExpertMatrices, outputs: int) -> tuple[ExpertMatrix, int]:
    """Matrices of experts as products read them, and how many there are.

    Args:
        weight: a tensor [E, O, I], or the rows of all experts in one weight.
        outputs: O.
    """
    if isinstance(weight, torch.Tensor):
        return weight, len(weight)
    assert isinstance(weight, QuantisedWeight)
    (matrix,) = weight.matrices
    held = weight.shape[0] // outputs
    if isinstance(matrix, torch.Tensor):
        return matrix.view(held, outputs, -1), held
    return matrix, held
