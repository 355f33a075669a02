"""Latent attention: what it gives is multi-head attention over keys and values that were computed
from the latents, to the bit however the tokens come.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tokenspeed.core.errors import KernelError
from tokenspeed.kernels import ops
from tokenspeed.kernels.cpu import CpuRuntime, supported_isas
from tokenspeed.kernels.cpu.latent import append_latents, paged_mla, partial_mla
from tokenspeed.kernels.rows import ContextShare, PagedRows
from tokenspeed.kernels.verify.case import noise
from tokenspeed.kernels.verify.paging import scattered_rows

# As DeepSeek-V2-Lite has them, but for the number of heads.
HEADS, NOPE, ROPE, VALUE, RANK = 6, 128, 64, 128, 512
PAGE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Queries of one row or more, and its latents in the order of positions."""

    q: torch.Tensor
    latents: list[torch.Tensor]
    rows: PagedRows
    pool: torch.Tensor


def make_case(lengths: list[tuple[int, int]], *, dtype: torch.dtype) -> Case:
    """Latents go to the pool as the op writes them; what it does not write is no number."""
    rows, pages = scattered_rows(lengths, page_size=PAGE, seed=len(lengths))
    pool = torch.full((pages, PAGE, RANK + ROPE), torch.nan, dtype=dtype)
    latents = []
    for row, slot in enumerate(rows.row_slots.tolist()):
        at = torch.arange(sum(lengths[row]))
        slots = rows.page_table_XP[slot][at // PAGE].long() * PAGE + at % PAGE
        latents.append(noise(len(at), RANK + ROPE, dtype=dtype, seed=row))
        ops.kvcache.append_latents(latents[-1], pool, slots)
    q = noise(int(rows.query_starts[-1]), HEADS, RANK + ROPE, dtype=dtype, seed=99)
    return Case(q=q, latents=latents, rows=rows, pool=pool)


def test_absorbed_queries_give_multi_head_attention() -> None:
    """Beside keys and values of every head, made by the up-projections, with a causal mask."""
    lengths = [(300, 1), (0, 40), (120, 7)]
    case = make_case(lengths, dtype=torch.float32)
    up_k = noise(HEADS, NOPE, RANK, dtype=torch.float64, seed=5) / math.sqrt(RANK)
    up_v = noise(HEADS, VALUE, RANK, dtype=torch.float64, seed=6) / math.sqrt(RANK)
    tokens = int(case.rows.query_starts[-1])
    q = noise(tokens, HEADS, NOPE + ROPE, dtype=torch.float64, seed=7)
    scale = (NOPE + ROPE) ** -0.5
    exact = []
    for row, latents in enumerate(case.latents):
        start, end = case.rows.query_starts[row : row + 2].tolist()
        compressed, rotated = latents.double().split((RANK, ROPE), -1)
        keys = torch.cat(
            (
                torch.einsum("nr,hdr->hnd", compressed, up_k),
                rotated.expand(HEADS, *rotated.shape),
            ),
            -1,
        )
        values = torch.einsum("nr,hdr->hnd", compressed, up_v)
        scores = torch.einsum("thd,hnd->htn", q[start:end], keys) * scale
        positions = torch.arange(len(latents))
        later = positions > positions[lengths[row][0] :, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        exact.append(torch.einsum("htn,hnd->thd", weights, values))
    absorbed = torch.einsum("thd,hdr->thr", q[..., :NOPE], up_k)
    absorbed = torch.cat((absorbed, q[..., NOPE:]), -1).float()
    for isa in supported_isas():
        runtime = CpuRuntime(threads=2, isa=isa)
        out = paged_mla(absorbed, case.pool, case.rows, scale, value_dim=RANK, runtime=runtime)
        found = torch.einsum("thr,hdr->thd", out.double(), up_v)
        assert ((found - torch.cat(exact)).norm() / torch.cat(exact).norm()) < 1e-6, isa
    reference = ops.attention.paged_mla(absorbed, case.pool, case.rows, scale, value_dim=RANK)
    assert torch.allclose(reference, out, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gets_the_same_bits_however_its_row_is_cut(dtype: torch.dtype) -> None:
    """On every instruction set: all at once, in chunks beside another row, or one by one."""
    length = 530
    case = make_case([(0, length)], dtype=dtype)
    found = []
    for isa in supported_isas():
        runtime = CpuRuntime(threads=2, isa=isa)
        whole = paged_mla(case.q, case.pool, case.rows, 0.05, value_dim=RANK, runtime=runtime)
        found.append(whole)
        for threads, start, end in ((1, 0, 1), (2, 255, 258), (1, 450, 530), (2, 529, 530)):
            other = CpuRuntime(threads=threads, isa=isa)
            rows = replace(
                case.rows,
                query_starts=np.array([0, end - start, end - start + 1], dtype=np.int32),
                context_lens=np.array([start, 512], dtype=np.int32),
                row_slots=np.repeat(case.rows.row_slots, 2),
            )
            q = torch.cat((case.q[start:end], case.q[512:513]))
            part = paged_mla(q, case.pool, rows, 0.05, value_dim=RANK, runtime=other)
            assert torch.equal(part[:-1], whole[start:end]), (isa, start, end)
            assert torch.equal(part[-1], whole[512]), isa
    assert all(torch.equal(found[0], whole) for whole in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_part_is_the_same_bits_however_its_row_is_cut(dtype: torch.dtype) -> None:
    """Of a share that the row's positions come to in runs, and that its first do not."""
    length, share = 1300, ContextShare(index=1, ranks=2)
    case = make_case([(0, length)], dtype=dtype)
    whole = replace(case.rows, share=share)
    runtime = CpuRuntime(threads=2, isa=None)
    options = {"value_dim": RANK}
    found = partial_mla(case.q, case.pool, whole, 0.05, **options, runtime=runtime)
    assert found[:PAGE, :, -1].isneginf().all() and not found[:PAGE, :, :-1].any()
    assert found[PAGE:].isfinite().all()
    for isa in supported_isas():
        for threads, start, end in ((1, 0, 40), (2, 600, 640), (1, 1290, 1300), (3, 1299, 1300)):
            other = CpuRuntime(threads=threads, isa=isa)
            rows = replace(
                whole,
                query_starts=np.array([0, end - start, end - start + 1], dtype=np.int32),
                context_lens=np.array([start, 1200], dtype=np.int32),
                row_slots=np.repeat(case.rows.row_slots, 2),
            )
            q = torch.cat((case.q[start:end], case.q[1200:1201]))
            part = partial_mla(q, case.pool, rows, 0.05, **options, runtime=other)
            assert torch.equal(part[:-1], found[start:end]), (isa, start, end)
            assert torch.equal(part[-1], found[1200]), isa


def test_latents_may_be_kept_in_another_type() -> None:
    case = make_case([(0, 50)], dtype=torch.bfloat16)
    runtime = CpuRuntime(threads=1, isa=None)
    pool = torch.zeros_like(case.pool)
    slots = torch.arange(50)
    append_latents(case.latents[0].float() + 1e-4, pool, slots, runtime=runtime)
    expected = (case.latents[0].float() + 1e-4).bfloat16()
    assert torch.equal(pool.flatten(0, 1)[:50], expected)


def test_what_does_not_fit_is_refused() -> None:
    runtime = CpuRuntime(threads=1, isa=None)
    case = make_case([(0, 3)], dtype=torch.float32)
    with pytest.raises(KernelError, match="values of 40 elements; they must be a multiple of 32"):
        paged_mla(case.q, case.pool, case.rows, 1.0, value_dim=40, runtime=runtime)
    with pytest.raises(KernelError, match="over latents of 64"):
        paged_mla(
            case.q, case.pool[..., :64].contiguous(), case.rows, 1.0, value_dim=32, runtime=runtime
        )
    with pytest.raises(KernelError, match="at most 640"):
        append_latents(
            torch.zeros(1, 656), torch.zeros(1, 4, 656), torch.tensor([0]), runtime=runtime
        )
    with pytest.raises(KernelError, match="slot 4 of a pool of 1 pages"):
        append_latents(
            torch.zeros(1, 64), torch.zeros(1, 4, 64), torch.tensor([4]), runtime=runtime
        )
    with pytest.raises(KernelError, match="queries for rows of 3 tokens"):
        paged_mla(case.q[:2], case.pool, case.rows, 1.0, value_dim=RANK, runtime=runtime)
