"""Triton's mixtures of experts, interpreted, against the formula and the reference."""

import random

import pytest
import torch

from tests.kernels.triton_cases import SEED, drawn_cases, interpreting, verify_interpreted
from tests.support.triton_interpreter import needs_interpreter
from tokenspeed.kernels import reference
from tokenspeed.kernels.triton import moe

pytestmark = needs_interpreter
__all__ = ["interpreting"]


@pytest.mark.parametrize("op", ["moe.route", "moe.experts"])
def test_experts_are_what_the_formula_says(op: str) -> None:
    for kernel, case in drawn_cases(op, each=4):
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


def test_more_tokens_than_fit_at_once_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(SEED)
    x_TM, weights_TK = torch.randn(11, 16), torch.rand(11, 1)
    experts_TK = torch.randint(0, 2, (11, 1))
    gate_up, down = torch.randn(2, 32, 16), torch.randn(2, 16, 16)
    operands = (x_TM, gate_up, down, experts_TK, weights_TK)
    wanted = reference.moe.experts(*operands, first=0)
    monkeypatch.setattr(moe, "_TOKENS_AT_ONCE", 4)
    assert torch.allclose(moe.experts(*operands, first=0), wanted, atol=1e-4)
