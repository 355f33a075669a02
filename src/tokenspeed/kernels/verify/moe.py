"""Mixtures of experts.

Legend: T tokens, M model features, E experts, K experts of a token, F features of an expert,
G groups of experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.quantised import (
    FLOAT8_BLOCKS,
    INT4_GROUPS,
    QUANTISED,
    QuantisedMatrix,
)
from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.verify.blocks import packed_weight
from tokenspeed.kernels.verify.case import TYPES, Call, Case, Compared, compare, equal, named, noise
from tokenspeed.kernels.verify.quantised import random_float4, random_float8, random_int4
from tokenspeed.kernels.weights import (
    GROUPED,
    PACKED,
    PACKED_FLOAT4,
    PANELS,
    PackedGroups,
    PackedWeight,
)

__all__ = ["add_cases", "experts_cases", "route_cases"]

# Experts held, and the number of the first: tokens ask for others too.
_HELD, _FIRST, _EXPERTS, _CHOSEN = 3, 2, 6, 4
_LIMIT = 1.5
_ROUTINGS: tuple[Mapping[str, Any], ...] = (
    {"scoring": "softmax", "normalise": False, "scale": 1.0, "groups": 1, "groups_kept": 1},
    {"scoring": "softmax", "normalise": True, "scale": 1.0, "groups": 1, "groups_kept": 1},
    {"scoring": "chosen", "normalise": False, "scale": 1.0, "groups": 1, "groups_kept": 1},
    {"scoring": "softmax", "normalise": False, "scale": 16.0, "groups": 4, "groups_kept": 2},
    {"scoring": "sigmoid", "normalise": True, "scale": 2.5, "groups": 4, "groups_kept": 2},
)


@dataclass(frozen=True, slots=True)
class _Sizes:
    format_name: str
    dtype: torch.dtype
    tokens: int
    features: int
    hidden: int

    def matrices(self, outputs: int, inputs: int, runtime: CpuRuntime) -> tuple[Any, torch.Tensor]:
        """A matrix of each expert as a kernel reads them, and their values in float64."""
        if self.format_name == PACKED:
            both = [
                packed_weight((("Q8_0", outputs),), inputs, dtype=self.dtype, runtime=runtime)
                for _ in range(_HELD)
            ]
            return [weight for weight, _ in both], torch.stack([v for _, v in both]).double()
        if self.format_name in GROUPED:
            return self._in_groups(outputs, inputs, runtime)
        if self.format_name in QUANTISED:
            return self._quantised(outputs, inputs)
        values = noise(_HELD, outputs, inputs, dtype=self.dtype, seed=outputs)
        if self.format_name not in PANELS:
            return values, values.double()
        packed = []
        for matrix in values:
            weight = PackedWeight(
                (outputs, inputs), parts=(outputs,), dtype=self.dtype, runtime=runtime
            )
            weight.pack_dense(0, matrix)
            packed.append(weight)
        return packed, values.double()

    def _in_groups(
        self, outputs: int, inputs: int, runtime: CpuRuntime
    ) -> tuple[Any, torch.Tensor]:
        """Two parts a matrix; of the last expert the lower one is dense."""
        upper = outputs // 2 + 3
        parts = (upper, outputs - upper)
        packed, values = [], []
        for expert in range(_HELD):
            weight = PackedGroups((outputs, inputs), parts=parts, dtype=self.dtype, runtime=runtime)
            for part, count in enumerate(parts):
                seed = 2 * expert + part
                found: QuantisedMatrix = (
                    random_float4(count, inputs, seed=seed)
                    if self.format_name == PACKED_FLOAT4
                    else random_int4(count, inputs, 32, zeros=bool(part), seed=seed)
                )
                exact = found.to_float().to(self.dtype)
                if seed == 2 * _HELD - 1:
                    weight.pack_dense(part, exact)
                    values.append(exact.double())
                else:
                    weight.pack(part, found)
                    values.append(found.to_float().double())
            packed.append(weight)
        return packed, torch.cat(values).view(_HELD, outputs, inputs)

    def _quantised(self, outputs: int, inputs: int) -> tuple[Any, torch.Tensor]:
        """Two parts a matrix, all of one kind."""
        upper = outputs // 2 + 3
        weight = QuantisedWeight(
            (_HELD * outputs, inputs),
            format_name=self.format_name,
            parts=(upper, outputs - upper) * _HELD,
            dtype=self.dtype,
            device=torch.device("cpu"),
            uniform=True,
        )
        values = []
        for part, count in enumerate((upper, outputs - upper) * _HELD):
            found = _random(self.format_name, count, inputs, seed=part + outputs)
            weight.pack(part, found)
            values.append(found.to_float().double())
        return weight, torch.cat(values).view(_HELD, outputs, inputs)


def _random(format_name: str, outputs: int, inputs: int, *, seed: int) -> QuantisedMatrix:
    if format_name == FLOAT8_BLOCKS:
        return random_float8(outputs, inputs, seed=seed)
    if format_name == INT4_GROUPS:
        return random_int4(outputs, inputs, 32, zeros=bool(inputs % 64), seed=seed)
    return random_float4(outputs, inputs, seed=seed)


def add_cases() -> Iterator[Case]:
    """Rows of any length."""
    for dtype in TYPES:
        for tokens, features in ((1, 1), (5, 77), (40, 576)):
            yield Case(
                op="moe.add",
                format_name=named(dtype),
                dtype=dtype,
                name=f"{tokens} x {features}",
                check=partial(_add, (tokens, features), dtype),
            )


def experts_cases() -> Iterator[Case]:
    """Tokens of no expert that is held, of one, of all."""
    for dtype in TYPES:
        formats = (named(dtype), f"{named(dtype)}_panels", PACKED, *GROUPED, *QUANTISED)
        for format_name in formats:
            if format_name.endswith("_panels") and format_name not in PANELS:
                continue
            if format_name in (PACKED, *GROUPED) and dtype == torch.float16:
                continue
            for tokens, features, hidden in ((1, 32, 32), (5, 64, 96), (37, 96, 64)):
                sizes = _Sizes(format_name, dtype, tokens, features, hidden)
                yield Case(
                    op="moe.experts",
                    format_name=format_name,
                    dtype=dtype,
                    name=f"{tokens} x {features} x {hidden}, {named(dtype)}",
                    check=partial(_experts, sizes, None),
                )
                yield Case(
                    op="moe.experts",
                    format_name=format_name,
                    dtype=dtype,
                    name=f"{tokens} x {features} x {hidden}, {named(dtype)}, biases and a limit",
                    check=partial(_experts, sizes, _LIMIT),
                )


def route_cases() -> Iterator[Case]:
    """Each kind of scores, with groups and a bias too."""
    for dtype in TYPES:
        for routing in _ROUTINGS:
            yield Case(
                op="moe.route",
                format_name=named(dtype),
                dtype=dtype,
                name=", ".join(f"{name}={value}" for name, value in routing.items()),
                check=partial(_route, routing, dtype),
            )


def _add(
    shape: tuple[int, int], dtype: torch.dtype, kernel: Call, runtime: CpuRuntime
) -> Iterator[Compared]:
    a_TM, b_TM = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1)
    yield compare("the sum", kernel(a_TM, b_TM), a_TM.double() + b_TM.double(), dtype)


def _experts(
    sizes: _Sizes, limit: float | None, kernel: Call, runtime: CpuRuntime
) -> Iterator[Compared]:
    x_TM = noise(sizes.tokens, sizes.features, dtype=sizes.dtype)
    gate_up, gate_up_E2FM = sizes.matrices(2 * sizes.hidden, sizes.features, runtime)
    down, down_EMF = sizes.matrices(sizes.features, sizes.hidden, runtime)
    order_TE = noise(sizes.tokens, _EXPERTS, dtype=torch.float32, seed=3).argsort(-1)
    experts_TK = order_TE[:, :_CHOSEN].contiguous()
    weights_TK = noise(sizes.tokens, _CHOSEN, dtype=torch.float32, seed=4).abs()
    biases: dict[str, torch.Tensor] = {}
    if limit is not None:
        biases = {
            "gate_up_bias_E2F": noise(_HELD, 2 * sizes.hidden, dtype=sizes.dtype, seed=5),
            "down_bias_EM": noise(_HELD, sizes.features, dtype=sizes.dtype, seed=6),
        }
    exact_TM = torch.zeros(sizes.tokens, sizes.features, dtype=torch.float64)
    for token, place in torch.cartesian_prod(
        torch.arange(sizes.tokens), torch.arange(_CHOSEN)
    ).tolist():
        expert = int(experts_TK[token, place]) - _FIRST
        if 0 <= expert < _HELD:
            both_2F = gate_up_E2FM[expert] @ x_TM[token].double()
            if limit is None:
                gate_F, up_F = both_2F.chunk(2)
                found_M = down_EMF[expert] @ (gate_F / (1 + torch.exp(-gate_F)) * up_F)
            else:
                gate_F, up_F = (both_2F + biases["gate_up_bias_E2F"][expert].double()).chunk(2)
                gate_F, up_F = gate_F.clamp(max=limit), up_F.clamp(-limit, limit)
                hidden_F = gate_F / (1 + torch.exp(-1.702 * gate_F)) * (up_F + 1)
                found_M = down_EMF[expert] @ hidden_F + biases["down_bias_EM"][expert].double()
            exact_TM[token] += found_M * weights_TK[token, place].double()
    how = {"first": _FIRST, "limit": limit, **biases}
    found_TM = kernel(x_TM, gate_up, down, experts_TK, weights_TK, **how)
    # One token may meet no expert that is held, and then the result is zero.
    yield compare("out", found_TM, exact_TM, sizes.dtype)


def _route(
    routing: Mapping[str, Any], dtype: torch.dtype, kernel: Call, runtime: CpuRuntime
) -> Iterator[Compared]:
    logits_TE = noise(9, 16, dtype=dtype)
    bias_E = noise(16, dtype=torch.float32, seed=1) if routing["scoring"] == "sigmoid" else None
    experts_TK, weights_TK = kernel(logits_TE, bias_E, 4, **routing)
    wanted = [_routed(row, bias_E, routing) for row in logits_TE.double()]
    yield equal("experts", experts_TK, torch.tensor([experts for experts, _ in wanted]))
    exact_TK = torch.tensor([weights for _, weights in wanted], dtype=torch.float64)
    yield compare("weights", weights_TK, exact_TK, torch.float32)


def _routed(
    logits_E: torch.Tensor, bias_E: torch.Tensor | None, routing: Mapping[str, Any]
) -> tuple[list[int], list[float]]:
    """One token's experts and weights, by the words of the op."""
    scores = {
        "softmax": logits_E.softmax(-1),
        "sigmoid": logits_E.sigmoid(),
        "chosen": logits_E,
    }[routing["scoring"]].tolist()
    bias = [0.0] * len(scores) if bias_E is None else bias_E.double().tolist()
    choice = [score + added for score, added in zip(scores, bias, strict=True)]
    groups, size = routing["groups"], len(scores) // routing["groups"]
    worth = [
        sum(sorted(choice[group * size :][:size], reverse=True)[: 1 if bias_E is None else 2])
        for group in range(groups)
    ]
    kept = sorted(range(groups), key=lambda group: -worth[group])[: routing["groups_kept"]]
    allowed = [expert for expert in range(len(scores)) if expert // size in kept]
    chosen = sorted(allowed, key=lambda expert: -choice[expert])[:4]
    weights = torch.tensor([scores[expert] for expert in chosen], dtype=torch.float64)
    if routing["scoring"] == "chosen":
        weights = weights.softmax(-1)
    if routing["normalise"]:
        weights = weights / weights.sum()
    return chosen, (weights * routing["scale"]).tolist()
