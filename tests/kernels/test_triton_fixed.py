"""Deterministic mode: a row's bits, interpreted, alone and beside others, at once and in chunks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.triton_cases import GPU, SEED, drawn_cases, interpreting, verify_interpreted
from tests.support.triton_interpreter import needs_interpreter
from tokenspeed.core.errors import KernelError
from tokenspeed.kernels import KernelSelector, ops, registry
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.triton import attention, gemm, latent, moe
from tokenspeed.kernels.verify.paging import scattered_rows

pytestmark = needs_interpreter
__all__ = ["interpreting"]

CUDA = torch.device("cuda")


def part_of(rows: PagedRows, row: int, first: int, end: int) -> PagedRows:
    """Tokens first:end of one row, as a step of its own."""
    start = int(rows.query_starts[row])
    return replace(
        rows,
        query_starts=np.array([0, end - first], dtype=np.int32),
        context_lens=rows.context_lens[row : row + 1] + np.int32(first),
        row_slots=rows.row_slots[row : row + 1],
        kv_slots_T=rows.kv_slots_T[start + first : start + end],
    )


@pytest.mark.parametrize("op", ["gemm.linear", "gemm.logits", "gemm.heads"])
def test_products_of_one_tile_are_what_the_formula_says(op: str) -> None:
    for kernel, case in drawn_cases(op, each=3):
        verify_interpreted(kernel, case)


def test_attention_is_the_same_bits_in_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 64 positions, so that short rows have several."""
    monkeypatch.setattr(attention, "FIXED_SPLIT", 64)
    torch.manual_seed(SEED)
    rows, pages = scattered_rows([(150, 30), (90, 1), (0, 5)], page_size=16, seed=SEED % 1000)
    q_TQD = torch.randn(36, 4, 32)
    k_PCHD, v_PCHD = torch.randn(2, pages, 16, 2, 32)
    sinks_Q = torch.randn(4)
    for window in (None, 60):

        def attend(q: torch.Tensor, rows: PagedRows, window: int | None = window) -> torch.Tensor:
            return attention.paged_mha_fixed(
                q, k_PCHD, v_PCHD, rows, 0.2, window=window, sinks_Q=sinks_Q
            )

        whole = attend(q_TQD, rows)
        for row, first, end in ((0, 0, 30), (0, 7, 8), (0, 13, 30), (1, 0, 1), (2, 2, 5)):
            start = int(rows.query_starts[row])
            of_part = slice(start + first, start + end)
            alone = attend(q_TQD[of_part], part_of(rows, row, first, end))
            assert torch.equal(alone, whole[of_part]), (window, row, first, end)


def test_latent_attention_is_the_same_bits_in_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "FIXED_SPLIT", 64)
    torch.manual_seed(SEED)
    rows, pages = scattered_rows([(150, 9), (70, 2), (33, 1)], page_size=32, seed=SEED % 1000)
    q_TQE, pool_PCE = torch.randn(12, 6, 40), torch.randn(pages, 32, 40)

    def attend(q: torch.Tensor, rows: PagedRows) -> torch.Tensor:
        return latent.paged_mla_fixed(q, pool_PCE, rows, 0.2, value_dim=32)

    whole = attend(q_TQE, rows)
    for row, first, end in ((0, 0, 9), (0, 4, 5), (1, 0, 2), (2, 0, 1)):
        start = int(rows.query_starts[row])
        of_part = slice(start + first, start + end)
        alone = attend(q_TQE[of_part], part_of(rows, row, first, end))
        assert torch.equal(alone, whole[of_part]), (row, first, end)


def test_products_and_experts_are_the_same_bits_in_any_batch() -> None:
    torch.manual_seed(SEED)
    x_TI, weight_OI = torch.randn(70, 130), torch.randn(45, 130)
    whole = gemm.linear(x_TI, weight_OI, weight_OI[:, 0])
    experts_TK = torch.rand(70, 5).argsort(-1)[:, :2].contiguous()
    matrices = torch.randn(5, 40, 130), torch.randn(5, 130, 20)
    weights_TK = torch.rand(70, 2)
    mixed = moe.experts_fixed(x_TI, *matrices, experts_TK, weights_TK, first=0)
    for part in (slice(0, 1), slice(64, 70), slice(13, 40)):
        assert torch.equal(gemm.linear(x_TI[part], weight_OI, weight_OI[:, 0]), whole[part])
        terms = (experts_TK[part], weights_TK[part])
        assert torch.equal(moe.experts_fixed(x_TI[part], *matrices, *terms, first=0), mixed[part])


def test_deterministic_selection_takes_no_kernel_whose_rows_depend_on_the_batch() -> None:
    plain = KernelSelector(device=CUDA, dtype=torch.bfloat16, platform=GPU)
    fixed = KernelSelector(device=CUDA, dtype=torch.bfloat16, platform=GPU, deterministic=True)
    wanted = {
        "attention.paged_mha": ("paged_mha", "paged_mha_fixed", {"head_dim": 128}),
        "attention.paged_mla": (
            "paged_mla",
            "paged_mla_fixed",
            {"latent_dim": 576, "value_dim": 512},
        ),
        "gemm.linear": ("linear", "linear", {"bias": False}),
        "moe.experts": ("experts", "experts_fixed", {}),
    }
    for op, (usual, invariant, traits) in wanted.items():
        winners = [selector.explain(op, traits=traits).winner for selector in (plain, fixed)]
        assert [winner.name for winner in winners if winner] == [usual, invariant], op
    assert "torch:linear: a row's last bits depend" in str(
        fixed.explain("gemm.linear", traits={"bias": True})
    )
    # How long a prompt is decides what of it goes here; without it all goes through `paged_mla`.
    sizes = {"latent_dim": 576, "value_dim": 512}
    assert plain.select_beyond_reference(ops.attention.prompt_mla, traits=sizes) is not None
    assert fixed.select_beyond_reference(ops.attention.prompt_mla, traits=sizes) is None
    for op in set(registry.ops) - {ops.attention.prompt_mla.name}:
        assert any(not kernel.batch_dependent for kernel in registry.candidates(op)), op


def test_what_was_forced_and_depends_on_the_batch_is_refused() -> None:
    forced = KernelSelector(
        device=CUDA,
        dtype=torch.bfloat16,
        platform=GPU,
        deterministic=True,
        overrides={"gemm.linear": "torch"},
    )
    with pytest.raises(KernelError, match="depend on what shares its batch"):
        forced.select(ops.gemm.linear, traits={"bias": False})
