"""The two products of a mixture of experts, over tiles of pairs of a token and an expert.

Weights are dense, or numbers as quantised checkpoints have them, which the same tiles multiply as
in `quantised.py`: of experts that some tokens chose, half a byte or one is read for each weight.

Legend: T tokens, M model features, E experts, F features of an expert, N pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from tokenspeed.kernels.ops.moe import GATE_SLOPE
from tokenspeed.kernels.quantised import Float4Groups, Float8Blocks, Int4Groups, QuantisedMatrix
from tokenspeed.kernels.triton.attention import dot_precision
from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.quantised import float8_rows
from tokenspeed.kernels.triton.tuning import tuned

__all__ = ["HIGH_TILE", "LOW_TILE", "ExpertMatrix", "Pairs", "down", "gate_up"]

_dense = DeviceCode("moe")
_quantised = DeviceCode("moe_quantised")
HIGH_TILE, LOW_TILE = 64, 16
"""Pairs of a tile."""

_KINDS: Final[Mapping[type[QuantisedMatrix], str]] = {
    Float8Blocks: "float8",
    Int4Groups: "int4",
    Float4Groups: "float4",
}

ExpertMatrix = torch.Tensor | QuantisedMatrix
"""Matrices of E experts: a tensor [E, O, I], or one quantised matrix [E * O, I]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Pairs in the order of experts.

    Attributes:
        order_N: int32, their numbers: of each, its token times the experts of a token, plus which.
        counts_E: int32, how many pairs each expert has.
        per_token: experts of a token.
        room: a power of 2 that is not below E.
        height: pairs of a tile.
    """

    order_N: torch.Tensor
    counts_E: torch.Tensor
    per_token: int
    room: int
    height: int

    @property
    def tiles(self) -> int:
        """A tile that is not full for each expert, and no more experts than pairs have one."""
        pairs = len(self.order_N)
        return pairs // self.height + min(len(self.counts_E), pairs)


def gate_up(
    x_TM: torch.Tensor,
    weight: ExpertMatrix,
    bias_E2F: torch.Tensor | None,
    pairs: Pairs,
    *,
    features: int,
    limit: float | None,
) -> torch.Tensor:
    """hidden_NF of x's type, by pairs in the order of experts."""
    hidden_NF = torch.empty((len(pairs.order_N), features), dtype=x_TM.dtype, device=x_TM.device)
    outputs, launch = _tile(x_TM, weight, pairs)
    common = {
        "HAS_BIAS": bias_E2F is not None,
        "LIMITED": limit is not None,
        "SLOPE": GATE_SLOPE,
        "M": pairs.height,
        "E": pairs.room,
        **launch,
    }
    held = len(pairs.counts_E)
    if isinstance(weight, torch.Tensor):
        _dense.gate_up[(pairs.tiles, -(-features // outputs))](
            x_TM,
            weight,
            bias_E2F,
            pairs.order_N,
            pairs.counts_E,
            hidden_NF,
            features,
            x_TM.shape[1],
            pairs.per_token,
            held,
            x_TM.stride(0),
            limit or 0.0,
            N=outputs,
            INPUTS=_inputs(x_TM),
            PRECISION=dot_precision(x_TM.dtype),
            **common,
        )
        return hidden_NF
    rows = _rows(x_TM, weight)
    # Gates and ups take turns as outputs of one tile.
    _quantised.gate_up[(pairs.tiles, -(-2 * features // outputs))](
        rows.values,
        rows.scales,
        *_operands(weight),
        bias_E2F,
        pairs.order_N,
        pairs.counts_E,
        hidden_NF,
        features,
        weight.shape[1],
        pairs.per_token,
        held,
        rows.values.stride(0),
        limit or 0.0,
        N=outputs,
        **_constants(weight, rows.values),
        **common,
    )
    return hidden_NF


def down(
    hidden_NF: torch.Tensor,
    weight: ExpertMatrix,
    bias_EM: torch.Tensor | None,
    pairs: Pairs,
    weights_TK: torch.Tensor,
    *,
    outputs: int,
) -> torch.Tensor:
    """Weighed results [N, M], float32, each where its pair's number says."""
    count, features = hidden_NF.shape
    found_NM = torch.empty((count, outputs), dtype=torch.float32, device=hidden_NF.device)
    held = len(pairs.counts_E)
    at_once, launch = _tile(hidden_NF, weight, pairs)
    grid = (pairs.tiles, -(-outputs // at_once))
    common = {"HAS_BIAS": bias_EM is not None, "M": pairs.height, "N": at_once, "E": pairs.room}
    if isinstance(weight, torch.Tensor):
        _dense.down[grid](
            hidden_NF,
            weight,
            bias_EM,
            pairs.order_N,
            pairs.counts_E,
            weights_TK,
            found_NM,
            features,
            outputs,
            held,
            INPUTS=_inputs(hidden_NF),
            PRECISION=dot_precision(hidden_NF.dtype),
            **common,
            **launch,
        )
        return found_NM
    rows = _rows(hidden_NF, weight)
    _quantised.down[grid](
        rows.values,
        rows.scales,
        *_operands(weight),
        bias_EM,
        pairs.order_N,
        pairs.counts_E,
        weights_TK,
        found_NM,
        features,
        outputs,
        held,
        **_constants(weight, rows.values),
        **common,
        **launch,
    )
    return found_NM


@dataclass(frozen=True, slots=True)
class _Rows:
    """What a product reads in place of activations.

    Attributes:
        values: rows as they are, or of FP8.
        scales: of FP8, float32 for each row and group; else None.
    """

    values: torch.Tensor
    scales: torch.Tensor | None


def _rows(x: torch.Tensor, weight: QuantisedMatrix) -> _Rows:
    if isinstance(weight, Float8Blocks):
        return _Rows(*float8_rows(x, weight.group))
    return _Rows(x, None)


def _operands(weight: QuantisedMatrix) -> tuple[torch.Tensor | None, ...]:
    """Numbers, scales, zeros, and blocks of outputs; None for what there is not."""
    match weight:
        case Float8Blocks():
            return weight.values_OI, weight.scales_BG, None, weight.blocks_O
        case Int4Groups():
            return weight.numbers, weight.scales_OG, weight.zeros_OG, None
        case Float4Groups():
            return weight.numbers, weight.powers_OG, None, None


def _constants(weight: QuantisedMatrix, values: torch.Tensor) -> Mapping[str, Any]:
    return {
        "KIND": _KINDS[type(weight)],
        "GROUP": weight.group,
        "STEP": weight.step,
        "HAS_ZEROS": isinstance(weight, Int4Groups) and weight.zeros_OG is not None,
        "PRECISION": dot_precision(values.dtype),
    }


def _inputs(x: torch.Tensor) -> int:
    return 32 if x.dtype == torch.float32 else 64


def _tile(x: torch.Tensor, weight: ExpertMatrix, pairs: Pairs) -> tuple[int, dict[str, int]]:
    """Outputs of a tile, and how it is run."""
    kind = ""
    if not isinstance(weight, torch.Tensor):
        kind = f", {_KINDS[type(weight)]} of {weight.group}"
    sizes = tuned(
        "moe.experts",
        f"{pairs.height} pairs, {x.dtype}{kind}",
        x.device,
        outputs=64,
        warps=8 if pairs.height >= HIGH_TILE else 4,
        stages=3,
    )
    return sizes["outputs"], {"num_warps": sizes["warps"], "num_stages": sizes["stages"]}
