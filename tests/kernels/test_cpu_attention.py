"""Native attention over interleaved pages: equal to the bit however the tokens come; windows and
caps, which no op has yet, against their formula. Without them: `test_verify.py`.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tokenspeed import _cpu
from tokenspeed.core.errors import KernelError
from tokenspeed.kernels.cpu import CpuRuntime, supported_isas
from tokenspeed.kernels.cpu.attention import append
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.verify import TOLERANCES
from tokenspeed.kernels.verify.attention import scattered_rows
from tokenspeed.kernels.verify.case import compare, named, noise

DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Queries, and KV in pages of the plain order of dimensions."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rows: PagedRows
    scale: float


def make_case(
    lengths: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
) -> Case:
    rows, pages = scattered_rows(lengths, page_size=page_size, seed=len(lengths))
    tokens = int(rows.query_starts[-1])
    k, v = (noise(pages, page_size, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    return Case(
        q=noise(tokens, heads, head_dim, dtype=dtype),
        k=k,
        v=v,
        rows=rows,
        scale=1.3 / math.sqrt(head_dim),
    )


def interleave(case: Case, runtime: CpuRuntime) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools with the case's positions as append writes them, and no numbers anywhere else."""
    pools = torch.full_like(case.k, torch.nan), torch.full_like(case.v, torch.nan)
    rows, size = case.rows, case.rows.page_size
    for row, slot in enumerate(rows.row_slots.tolist()):
        start, end = rows.query_starts[row : row + 2].tolist()
        at = torch.arange(int(rows.context_lens[row]) + end - start)
        pages = rows.page_table_XP[slot][at // size].long()
        append(
            case.k[pages, at % size],
            case.v[pages, at % size],
            *pools,
            pages * size + at % size,
            runtime=runtime,
        )
    return pools


def attend(
    case: Case,
    pools: tuple[torch.Tensor, torch.Tensor],
    runtime: CpuRuntime,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    out = torch.empty_like(case.q)
    rows = case.rows
    _cpu.attend(
        runtime,
        case.q,
        *pools,
        rows.query_starts,
        rows.context_lens,
        rows.row_slots,
        rows.page_table_XP,
        case.scale,
        window,
        soft_cap,
        out,
    )
    return out


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_gets_the_same_bits_however_its_row_is_cut(dtype: torch.dtype, isa: str) -> None:
    """All tokens of a long row at once, in chunks beside other rows, or one by one."""
    length = 1100
    case = make_case([(0, length)], heads=6, kv_heads=2, head_dim=64, page_size=32, dtype=dtype)
    runtime = CpuRuntime(threads=2, isa=isa)
    pools = interleave(case, runtime)
    whole = attend(case, pools, runtime)
    for threads in (1, 2):
        other = CpuRuntime(threads=threads, isa=isa)
        for start, end in ((0, 1), (255, 257), (256, 300), (1023, 1024), (1099, 1100), (64, 1100)):
            rows = replace(
                case.rows,
                query_starts=np.array([0, end - start, end - start + 1], dtype=np.int32),
                context_lens=np.array([start, 700], dtype=np.int32),
                row_slots=np.repeat(case.rows.row_slots, 2),
            )
            q = torch.cat((case.q[start:end], case.q[700:701]))
            found = attend(replace(case, q=q, rows=rows), pools, other)
            assert torch.equal(found[:-1], whole[start:end]), (threads, start, end)
            assert torch.equal(found[-1], whole[700])


def softmax_of_definition(case: Case, window: int, soft_cap: float) -> torch.Tensor:
    """One row of tokens, with a window and a cap on scores."""
    rows = case.rows
    (slot,) = rows.row_slots.tolist()
    length = len(case.q)
    at = torch.arange(length)
    pages = rows.page_table_XP[slot][at // rows.page_size].long()
    group = case.q.shape[1] // case.k.shape[2]
    k = case.k[pages, at % rows.page_size].double().repeat_interleave(group, 1)
    v = case.v[pages, at % rows.page_size].double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", case.q.double(), k) * case.scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    distance = at[:, None] - at[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "soft_cap"), [(1, 0.0), (100, 0.0), (300, 2.0), (0, 1.5)])
def test_windows_and_caps(window: int, soft_cap: float, dtype: torch.dtype) -> None:
    case = make_case([(0, 613)], heads=4, kv_heads=2, head_dim=32, page_size=16, dtype=dtype)
    exact = softmax_of_definition(case, window, soft_cap)
    for isa in supported_isas():
        runtime = CpuRuntime(threads=2, isa=isa)
        pools = interleave(case, runtime)
        ours = attend(case, pools, runtime, window=window, soft_cap=soft_cap)
        allowed = getattr(TOLERANCES["attention.paged_mha"], named(dtype))
        assert compare("out", ours, exact, dtype).error <= allowed
        # The last token alone, over pages of which those behind the window were given away.
        rows = replace(
            case.rows,
            query_starts=np.array([0, 1], dtype=np.int32),
            context_lens=np.array([612], dtype=np.int32),
        )
        if window:
            (slot,) = rows.row_slots.tolist()
            rows.page_table_XP[slot, : (613 - window) // 16] = -1
        last = attend(
            replace(case, q=case.q[612:], rows=rows),
            pools,
            runtime,
            window=window,
            soft_cap=soft_cap,
        )
        assert torch.equal(last[0], ours[612])
        case = make_case([(0, 613)], heads=4, kv_heads=2, head_dim=32, page_size=16, dtype=dtype)


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_of_a_rows_tokens_may_begin_in_different_blocks(
    dtype: torch.dtype, isa: str
) -> None:
    """Of blocks that are computed apart, some are not seen by all tokens; and nothing is left of
    an earlier call, whose results were no numbers."""
    length, window = 613, 300
    case = make_case([(0, length)], heads=4, kv_heads=2, head_dim=32, page_size=16, dtype=dtype)
    alone, threaded = (CpuRuntime(threads=threads, isa=isa) for threads in (1, 2))
    pools = interleave(case, alone)
    whole = attend(case, pools, alone, window=window)
    # The window of the first begins with the last position of a block.
    start, end = 256 + window - 2, 256 + window + 2
    rows = replace(
        case.rows,
        query_starts=np.array([0, end - start], dtype=np.int32),
        context_lens=np.array([start], dtype=np.int32),
    )
    few = replace(case, q=case.q[start:end], rows=rows)
    for runtime in (alone, threaded):
        spoilt = attend(few, (pools[0], torch.full_like(pools[1], torch.nan)), runtime)
        assert spoilt.isnan().all()
        found = attend(few, pools, runtime, window=window)
        assert torch.equal(found, whole[start:end]), runtime.threads


def test_what_does_not_fit_is_refused() -> None:
    runtime = CpuRuntime(threads=1, isa=None)
    case = make_case([(0, 5)], heads=2, kv_heads=1, head_dim=16, page_size=16, dtype=torch.float32)
    small = torch.zeros(2, 8, 1, 16), torch.zeros(2, 8, 1, 16)
    with pytest.raises(KernelError, match="multiples of 16"):
        attend(case, small, runtime)
    with pytest.raises(KernelError, match="one type"):
        attend(replace(case, q=case.q.bfloat16()), (case.k, case.v), runtime)
    with pytest.raises(KernelError, match="slot 64 of a pool of 4 pages"):
        pools = torch.zeros(4, 16, 1, 16), torch.zeros(4, 16, 1, 16)
        token = torch.zeros(1, 1, 16)
        append(token, token, *pools, torch.tensor([64]), runtime=runtime)
    with pytest.raises(KernelError, match="queries for rows"):
        attend(replace(case, q=case.q[:4]), (case.k, case.v), runtime)
