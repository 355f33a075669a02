"""Mixtures of experts.

Legend: T tokens, M model features, E experts, K experts of a token, F features of an expert,
G groups of experts, N pairs of a token and an expert.
"""

import torch

from tokenspeed.kernels.ops.moe import GATE_SLOPE
from tokenspeed.kernels.triton.attention import dot_precision
from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.registration import next_power_of_2, triton_kernel
from tokenspeed.kernels.triton.tuning import tuned

__all__ = ["experts", "experts_fixed", "route"]

_device = DeviceCode("moe")
_PAIRS_BLOCK = 1024
_HIGH_TILE, _LOW_TILE = 64, 16
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


@triton_kernel("moe.experts", batch_dependent=True)
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
    """Pairs in the order of experts, two products over tiles of them, and a sum for each token.

    How many pairs an expert has stays on the device: grids are as large as they can be needed, and
    a captured step may be run again for other tokens.
    """
    # As high as experts have pairs, on the average.
    high = experts_TK.numel() >= _HIGH_TILE // 2 * len(down_EMF)
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
        height=_HIGH_TILE if high else _LOW_TILE,
    )


@triton_kernel("moe.experts")
def experts_fixed(
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
        height=_LOW_TILE,
    )


def _experts(
    x_TM: torch.Tensor,
    gate_up_E2FM: torch.Tensor,
    down_EMF: torch.Tensor,
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
    for start in range(0, len(x_TM), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        _some_tokens(
            x_TM[part],
            gate_up_E2FM,
            down_EMF,
            experts_TK[part].contiguous(),
            weights_TK[part].contiguous(),
            out_TM=out_TM[part],
            first=first,
            gate_up_bias_E2F=gate_up_bias_E2F,
            down_bias_EM=down_bias_EM,
            limit=limit,
            height=height,
        )
    return out_TM


def _some_tokens(
    x_TM: torch.Tensor,
    gate_up_E2FM: torch.Tensor,
    down_EMF: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    out_TM: torch.Tensor,
    first: int,
    gate_up_bias_E2F: torch.Tensor | None,
    down_bias_EM: torch.Tensor | None,
    limit: float | None,
    height: int,
) -> None:
    tokens, per_token = experts_TK.shape
    held, outputs, features = down_EMF.shape
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
    inputs = 32 if x_TM.dtype == torch.float32 else 64
    sizes = tuned(
        "moe.experts",
        f"{height} pairs, {x_TM.dtype}",
        device,
        outputs=64,
        warps=8 if height >= _HIGH_TILE else 4,
        stages=3,
    )
    tile = {"M": height, "N": sizes["outputs"], "INPUTS": inputs}
    # A tile that is not full for each expert, and no more experts than pairs have one.
    tiles = pairs // tile["M"] + min(held, pairs)
    hidden_NF = torch.empty((pairs, features), dtype=x_TM.dtype, device=device)
    _device.gate_up[(tiles, -(-features // tile["N"]))](
        x_TM,
        gate_up_E2FM,
        gate_up_bias_E2F,
        order_N,
        counts_E,
        hidden_NF,
        features,
        x_TM.shape[1],
        per_token,
        held,
        x_TM.stride(0),
        limit or 0.0,
        HAS_BIAS=gate_up_bias_E2F is not None,
        LIMITED=limit is not None,
        SLOPE=GATE_SLOPE,
        E=room,
        PRECISION=dot_precision(x_TM.dtype),
        num_warps=sizes["warps"],
        num_stages=sizes["stages"],
        **tile,
    )
    found_NM = torch.empty((pairs, outputs), dtype=torch.float32, device=device)
    _device.down[(tiles, -(-outputs // tile["N"]))](
        hidden_NF,
        down_EMF,
        down_bias_EM,
        order_N,
        counts_E,
        weights_TK,
        found_NM,
        features,
        outputs,
        held,
        HAS_BIAS=down_bias_EM is not None,
        E=room,
        PRECISION=dot_precision(x_TM.dtype),
        num_warps=sizes["warps"],
        num_stages=sizes["stages"],
        **tile,
    )
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
