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
from tokenspeed.kernels.reference.rounded import append_rounded, read_rounded
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.verify import TOLERANCES
from tokenspeed.kernels.verify.case import compare, named, noise
from tokenspeed.kernels.verify.paging import scattered_rows

DTYPES = [torch.float32, torch.bfloat16]
# Types of rows and of pages.
KINDS = [
    (torch.float32, "float32"),
    (torch.bfloat16, "bfloat16"),
    (torch.float32, "int8"),
    (torch.bfloat16, "int8"),
]


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


def interleave(
    case: Case, runtime: CpuRuntime, *, kv: str | None = None, offset: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools with the case's positions as append writes them, and no numbers anywhere else."""
    kv = kv or named(case.q.dtype)
    if kv == "int8":
        shape = (*case.k.shape[:3], case.k.shape[3] + 4)
        pools = tuple(torch.full(shape, -1, dtype=torch.int8) for _ in range(2))
    else:
        pools = tuple(torch.full_like(case.k, torch.nan, dtype=getattr(torch, kv)) for _ in "kv")
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
            k_offset_HD=offset,
            runtime=runtime,
        )
    k, v = pools
    return k, v


def attend(
    case: Case,
    pools: tuple[torch.Tensor, torch.Tensor],
    runtime: CpuRuntime,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
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
        sinks,
        out,
    )
    return out


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize(("dtype", "kv"), KINDS)
def test_a_token_gets_the_same_bits_however_its_row_is_cut(
    dtype: torch.dtype, kv: str, isa: str
) -> None:
    """All tokens of a long row at once, in chunks beside other rows, or one by one."""
    length = 1100
    case = make_case([(0, length)], heads=6, kv_heads=2, head_dim=64, page_size=32, dtype=dtype)
    runtime = CpuRuntime(threads=2, isa=isa)
    pools = interleave(case, runtime, kv=kv)
    whole = attend(case, pools, runtime)
    for threads in (1, 2):
        other = CpuRuntime(threads=threads, isa=isa)
        for start, end in ((0, 1), (255, 257), (256, 300), (1023, 1024), (1099, 1100), (64, 330)):
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


# Weights farther apart than sums of them are exact; so far that many are less than any number;
# and of a model that looks for the least score.
@pytest.mark.parametrize("scale", [0.6, 9.0, -0.6])
@pytest.mark.parametrize("kv", ["float32", "bfloat16", "int8"])
def test_every_instruction_set_gives_the_same_bits_wherever_a_window_begins(
    kv: str, scale: float
) -> None:
    """By how a row is cut, what it sees begins in one vector of a block or another."""
    case = make_case(
        [(0, 420)], heads=6, kv_heads=2, head_dim=64, page_size=32, dtype=torch.float32
    )
    case = replace(case, scale=scale)
    exact = softmax_of_definition(case, 100, 0.0)
    # What rounding does to scores counts for more the farther they lie apart.
    allowed = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.03}[kv] * abs(scale) / 0.6
    expected = None
    for isa in supported_isas():
        runtime = CpuRuntime(threads=1, isa=isa)
        pools = interleave(case, runtime, kv=kv)
        whole = attend(case, pools, runtime, window=100)
        assert compare("out", whole, exact, torch.float32).error <= allowed
        assert expected is None or torch.equal(whole, expected), isa
        expected = whole
        for start, end in ((380, 420), (139, 140), (130, 150)):
            rows = replace(
                case.rows,
                query_starts=np.array([0, end - start], dtype=np.int32),
                context_lens=np.array([start], dtype=np.int32),
            )
            part = replace(case, q=case.q[start:end], rows=rows)
            assert torch.equal(attend(part, pools, runtime, window=100), whole[start:end]), isa


def test_every_instruction_set_writes_and_reads_rounded_pages_alike() -> None:
    """The reference's pages, too, to the bit."""
    case = make_case(
        [(0, 300), (290, 1)], heads=6, kv_heads=2, head_dim=96, page_size=48, dtype=torch.bfloat16
    )
    offset = 30 * noise(2, 96, dtype=torch.bfloat16, seed=3)
    found = []
    for isa in supported_isas():
        runtime = CpuRuntime(threads=2, isa=isa)
        pools = interleave(case, runtime, kv="int8", offset=offset)
        found.append((*pools, attend(case, pools, runtime)))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    k_found, _ = read_rounded(*found[0][:2])
    (written,) = torch.nonzero(k_found.flatten(2).isfinite().all(-1).flatten(), as_tuple=True)
    k, v = (pool.flatten(0, 1)[written] for pool in (case.k, case.v))
    k_pool, v_pool = (torch.full_like(found[0][0], -1) for _ in "kv")
    append_rounded(k, v, k_pool, v_pool, written, k_offset_HD=offset)
    assert torch.equal(found[0][0], k_pool)
    assert torch.equal(found[0][1], v_pool)


def test_an_offset_of_k_changes_no_result_but_its_error() -> None:
    """Elements that stand out alike in K of all positions would else leave few bits to others."""
    case = make_case(
        [(0, 400)], heads=4, kv_heads=2, head_dim=64, page_size=32, dtype=torch.float32
    )
    common = torch.zeros(2, 64)
    common[:, 7], common[:, 40] = 150.0, -90.0
    case = replace(case, k=case.k + common)
    exact = softmax_of_definition(case, 0, 0.0)
    runtime = CpuRuntime(threads=1, isa=None)
    errors = [
        compare(
            "out",
            attend(case, interleave(case, runtime, kv="int8", offset=offset), runtime),
            exact,
            torch.float32,
        ).error
        for offset in (None, common)
    ]
    assert errors[1] < 0.02 < 3 * errors[1] < errors[0]


@pytest.mark.parametrize("kv", DTYPES)
def test_pages_may_be_of_another_type_than_rows(kv: torch.dtype) -> None:
    """They hold what the rows' numbers become when they are rounded to it."""
    (other,) = {*DTYPES} - {kv}
    case = make_case(
        [(0, 77), (30, 1)], heads=4, kv_heads=2, head_dim=32, page_size=16, dtype=other
    )
    same = replace(case, q=case.q.to(kv), k=case.k.to(kv), v=case.v.to(kv))
    runtime = CpuRuntime(threads=2, isa=None)
    pools = interleave(case, runtime, kv=named(kv))
    for ours, exact in zip(pools, interleave(same, runtime), strict=True):
        assert torch.equal(ours.nan_to_num(9.0), exact.nan_to_num(9.0))
    assert torch.equal(
        attend(case, pools, runtime).to(kv), attend(same, pools, runtime).to(other).to(kv)
    )


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


@pytest.mark.parametrize(("dtype", "kv"), KINDS)
@pytest.mark.parametrize(("window", "soft_cap"), [(1, 0.0), (100, 0.0), (300, 2.0), (0, 1.5)])
def test_windows_and_caps(window: int, soft_cap: float, dtype: torch.dtype, kv: str) -> None:
    case = make_case([(0, 613)], heads=4, kv_heads=2, head_dim=32, page_size=16, dtype=dtype)
    exact = softmax_of_definition(case, window, soft_cap)
    for isa in supported_isas():
        runtime = CpuRuntime(threads=2, isa=isa)
        pools = interleave(case, runtime, kv=kv)
        ours = attend(case, pools, runtime, window=window, soft_cap=soft_cap)
        # Rounding K and V costs as much again as rounding queries.
        allowed = 3e-2 if kv == "int8" else getattr(TOLERANCES["attention.paged_mha"], kv)
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
        attend(case, (case.k, case.v.bfloat16()), runtime)
    with pytest.raises(KernelError, match=r"k_offset must be contiguous \[1, 16\]"):
        interleave(case, runtime, offset=torch.zeros(2, 16))
    with pytest.raises(KernelError, match="slot 64 of a pool of 4 pages"):
        pools = torch.zeros(4, 16, 1, 16), torch.zeros(4, 16, 1, 16)
        token = torch.zeros(1, 1, 16)
        append(token, token, *pools, torch.tensor([64]), runtime=runtime)
    with pytest.raises(KernelError, match="queries for rows"):
        attend(replace(case, q=case.q[:4]), (case.k, case.v), runtime)


@pytest.mark.parametrize("isa", supported_isas())
def test_sinks_count_once_however_a_long_row_is_cut(isa: str) -> None:
    length = 3000
    case = make_case(
        [(length - 1, 1)], heads=6, kv_heads=2, head_dim=64, page_size=32, dtype=torch.float32
    )
    sinks = torch.linspace(-3.0, 9.0, 6)
    alone, both = (CpuRuntime(threads=threads, isa=isa) for threads in (1, 2))
    pools = interleave(case, alone, kv="float32")
    whole = attend(case, pools, alone, sinks=sinks)
    assert torch.equal(attend(case, pools, both, sinks=sinks), whole)
    assert not torch.allclose(attend(case, pools, alone), whole, rtol=1e-2)
