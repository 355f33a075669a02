"""Triton's mixtures of experts, interpreted, against the formula and the reference."""

import random

import pytest
import torch

from tests.kernels.triton_cases import SEED, drawn_cases, interpreting, verify_interpreted
from tests.support.triton_interpreter import needs_interpreter
from tokenspeed.kernels import reference
from tokenspeed.kernels.quantised import (
    FLOAT4_GROUPS,
    FLOAT8_BLOCKS,
    INT4_GROUPS,
    QUANTISED,
    Float4Groups,
    QuantisedMatrix,
)
from tokenspeed.kernels.quantised_weight import QuantisedWeight
from tokenspeed.kernels.triton import moe
from tokenspeed.kernels.verify.quantised import random_float4, random_float8, random_int4

pytestmark = needs_interpreter
__all__ = ["interpreting"]


@pytest.mark.parametrize("op", ["moe.route", "moe.experts"])
def test_experts_are_what_the_formula_says(op: str) -> None:
    for kernel, case in drawn_cases(op, each=2):
        verify_interpreted(kernel, case)


@pytest.mark.parametrize("turn", range(3))
def test_any_experts_give_what_the_references_do(turn: int) -> None:
    choose = random.Random(SEED + turn)
    torch.manual_seed(SEED + turn)
    tokens, total, count = choose.choice((1, 9, 70)), choose.choice((5, 12)), choose.choice((1, 3))
    held, first = choose.choice(((total, 0), (3, 2), (1, total - 1)))
    features, hidden = choose.choice((33, 64)), choose.choice((20, 72))
    x_TM = torch.randn(tokens, features)
    gate_up = torch.randn(held, 2 * hidden, features) / 8
    down = torch.randn(held, features, hidden) / 8
    experts_TK, weights_TK = reference.moe.route(
        torch.randn(tokens, total),
        None,
        count,
        scoring="softmax",
        normalise=True,
        scale=1.0,
        groups=1,
        groups_kept=1,
    )
    operands = (x_TM, gate_up, down, experts_TK, weights_TK)
    wanted = reference.moe.experts(*operands, first=first)
    found = moe.experts(*operands, first=first)
    assert torch.allclose(found, wanted, atol=1e-4), (tokens, total, count, held, first)


def test_a_token_gets_the_same_bits_beside_others() -> None:
    torch.manual_seed(SEED)
    x_TM, weights_TK = torch.randn(40, 32), torch.rand(40, 2)
    experts_TK = torch.rand(40, 4).argsort(-1)[:, :2].contiguous()
    gate_up, down = torch.randn(4, 48, 32), torch.randn(4, 32, 24)
    together = moe.experts(x_TM, gate_up, down, experts_TK, weights_TK, first=0)
    for token in (0, 17, 39):
        one = slice(token, token + 1)
        alone = moe.experts(x_TM[one], gate_up, down, experts_TK[one], weights_TK[one], first=0)
        # numpy's product, which interprets the tile's, may sum in another order for another tile.
        assert torch.allclose(alone, together[one], rtol=1e-5, atol=1e-5)


def random_experts(format_name: str, experts: int, outputs: int, inputs: int) -> QuantisedWeight:
    weight = QuantisedWeight(
        (experts * outputs, inputs),
        format_name=format_name,
        parts=(outputs,) * experts,
        dtype=torch.float32,
        device=torch.device("cpu"),
        uniform=True,
    )
    for expert in range(experts):
        matrix: QuantisedMatrix
        if format_name == FLOAT8_BLOCKS:
            matrix = random_float8(outputs, inputs, seed=expert)
        elif format_name == INT4_GROUPS:
            matrix = random_int4(outputs, inputs, 32, zeros=True, seed=expert)
        else:
            matrix = random_float4(outputs, inputs, seed=expert)
        weight.pack(expert, matrix)
    return weight


@pytest.mark.parametrize("format_name", QUANTISED)
def test_a_token_gets_the_same_bits_of_quantised_experts_in_any_batch(format_name: str) -> None:
    torch.manual_seed(SEED)
    x_TM, weights_TK = torch.randn(21, 64), torch.rand(21, 2)
    experts_TK = torch.rand(21, 4).argsort(-1)[:, :2].contiguous()
    gate_up = random_experts(format_name, 4, 2 * 96, 64)
    down = random_experts(format_name, 4, 64, 96)
    call = moe.experts_float8_fixed if format_name == FLOAT8_BLOCKS else moe.experts_fixed
    together = call(x_TM, gate_up, down, experts_TK, weights_TK, first=0)
    assert together.norm() > 0
    for part in (slice(0, 1), slice(17, 21), slice(3, 11)):
        found = call(x_TM[part], gate_up, down, experts_TK[part], weights_TK[part], first=0)
        assert torch.equal(found, together[part])


def test_every_number_of_mxfp4_is_multiplied_as_what_it_stands_for() -> None:
    # A product with the identity gives the matrix; powers are the least and the greatest of use.
    inputs = 32
    numbers = torch.arange(16, dtype=torch.uint8).repeat(inputs, inputs // 16)
    powers_OG = torch.tensor([1, 64, 127, 200] * (inputs // 4), dtype=torch.uint8)[:, None]
    matrix = Float4Groups(numbers=numbers, powers_OG=powers_OG)
    down = QuantisedWeight(
        (inputs, inputs),
        format_name=FLOAT4_GROUPS,
        parts=(inputs,),
        dtype=torch.float32,
        device=torch.device("cpu"),
        uniform=True,
    )
    down.pack(0, matrix)
    # Gates so large that their sigmoid is one, so that what is between is what ups give.
    gate_up = torch.cat((torch.full((inputs, inputs), 32.0), torch.eye(inputs) / 1024))[None]
    x_TM = torch.eye(inputs)
    found_TM = moe.experts_fixed(
        x_TM,
        gate_up,
        down,
        torch.zeros(inputs, 1, dtype=torch.int64),
        torch.ones(inputs, 1),
        first=0,
    )
    assert torch.equal(found_TM, matrix.to_float().T / 32)


def test_more_tokens_than_fit_at_once_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(SEED)
    x_TM, weights_TK = torch.randn(11, 16), torch.rand(11, 1)
    experts_TK = torch.randint(0, 2, (11, 1))
    gate_up, down = torch.randn(2, 32, 16), torch.randn(2, 16, 16)
    operands = (x_TM, gate_up, down, experts_TK, weights_TK)
    wanted = reference.moe.experts(*operands, first=0)
    monkeypatch.setattr(moe, "_TOKENS_AT_ONCE", 4)
    assert torch.allclose(moe.experts(*operands, first=0), wanted, atol=1e-4)
