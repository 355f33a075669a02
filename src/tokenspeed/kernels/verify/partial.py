"""Attention over a rank's share of each context.

Legend: T tokens, L tokens of a row, N positions of a row, Q query heads, D elements of a head, X of
a part of an attention, P pages, C positions of a page.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.kv_formats import FLOAT8, ROUNDED
from tokenspeed.kernels.reference.rounded import append_rounded, read_rounded
from tokenspeed.kernels.rows import ContextShare, PagedRows
from tokenspeed.kernels.verify.attention import INTERLEAVED_HEADS, ROWS, Operands, interleaved
from tokenspeed.kernels.verify.case import (
    TYPES,
    Call,
    Case,
    Compared,
    compare,
    equal,
    named,
    noise,
)
from tokenspeed.kernels.verify.paging import scattered_rows, written_slots

__all__ = ["partial_mha_cases"]

_SHARES = (
    ContextShare(index=0, ranks=2),
    ContextShare(index=1, ranks=2),
    ContextShare(index=2, ranks=3),
)
_WINDOW = 40
_FORMATS = (
    *((named(dtype), dtype) for dtype in TYPES),
    (FLOAT8, torch.bfloat16),
    ("interleaved_float32", torch.float32),
    ("interleaved_bfloat16", torch.bfloat16),
    (ROUNDED, torch.float32),
    (ROUNDED, torch.bfloat16),
)


def partial_mha_cases() -> Iterator[Case]:
    """Decode and prompts over shares that hold much, little and nothing of a row."""
    for heads in INTERLEAVED_HEADS[::2]:
        for format_name, dtype in _FORMATS:
            for share in _SHARES:
                for name, lengths in ROWS.items():
                    whole = Operands(format_name, dtype, heads, lengths)
                    yield _case(whole, share, name)
                windowed = replace(whole, window=_WINDOW, has_sinks=True)
                yield _case(windowed, share, f"{name}, windows of {_WINDOW} and sinks")


def _case(of: Operands, share: ContextShare, name: str) -> Case:
    return Case(
        op="attention.partial_mha",
        format_name=of.format_name,
        dtype=of.dtype,
        name=f"{name}, share {share.index} of {share.ranks}, {of.heads}",
        traits={"head_dim": of.heads.dim},
        check=partial(_partial_mha, of, share),
    )


def _partial_mha(
    of: Operands, share: ContextShare, kernel: Call, runtime: CpuRuntime
) -> Iterator[Compared]:
    whole_size = of.heads.page_size * share.ranks
    rows, pages = scattered_rows(of.lengths, page_size=whole_size, seed=len(of.lengths))
    q_TQD = noise(int(rows.query_starts[-1]), of.heads.query, of.heads.dim, dtype=of.dtype)
    shape = (pages, whole_size, of.heads.kv, of.heads.dim)
    k_PCHD, v_PCHD = (noise(*shape, dtype=of.dtype, seed=seed) for seed in (1, 2))
    unwritten_PC = torch.ones(shape[:2], dtype=torch.bool)
    unwritten_PC.view(-1)[written_slots(rows)] = False
    for pool in (k_PCHD, v_PCHD):
        pool[unwritten_PC] = torch.nan
    own = slice(share.index * of.heads.page_size, (share.index + 1) * of.heads.page_size)
    pools = _laid_out(of, k_PCHD[:, own].contiguous(), v_PCHD[:, own].contiguous())
    if of.format_name == ROUNDED:
        # Rounding is no error of attention's: numbers are those that the pages hold.
        k_PCHD, v_PCHD = (pool.float() for pool in (k_PCHD, v_PCHD))
        for whole, read in zip((k_PCHD, v_PCHD), read_rounded(*pools), strict=True):
            whole[:, own] = read
    elif of.format_name == FLOAT8:
        k_PCHD, v_PCHD = (of.stored(pool).to(of.dtype) for pool in (k_PCHD, v_PCHD))
    scale = 1.3 / math.sqrt(of.heads.dim)
    means_TQD, log_sums_TQ = _exact(
        of, share, q_TQD=q_TQD, k_PCHD=k_PCHD, v_PCHD=v_PCHD, rows=rows, scale=scale
    )
    local = replace(rows, page_size=of.heads.page_size, share=share)
    found_TQX = kernel(q_TQD, *pools, local, scale, window=of.window, sinks_Q=of.sinks())
    seen_TQ = log_sums_TQ.isfinite()
    yield equal("what is seen", found_TQX[..., -1].isfinite(), seen_TQ)
    yield compare("means", found_TQX[..., :-1].contiguous(), means_TQD, torch.float32)
    yield compare(
        "logarithms of sums",
        found_TQX[..., -1].where(seen_TQ, 0.0),
        log_sums_TQ.where(seen_TQ, 0.0),
        torch.float32,
    )


def _laid_out(
    of: Operands, k_PCHD: torch.Tensor, v_PCHD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's plain pages as the format has them."""
    if of.format_name == ROUNDED:
        pages, page_size, kv_heads, dim = k_PCHD.shape
        # Bytes that no one has written, which as a scale are no number.
        k_pool, v_pool = (
            torch.full((pages, page_size, kv_heads, dim + 4), -1, dtype=torch.int8)
            for _ in range(2)
        )
        written = (~k_PCHD.isnan().flatten(2).any(-1)).flatten().nonzero()[:, 0]
        k_THD, v_THD = (pool.flatten(0, 1)[written].float() for pool in (k_PCHD, v_PCHD))
        if len(written):
            append_rounded(k_THD, v_THD, k_pool, v_pool, written)
        return k_pool, v_pool
    if not of.format_name.startswith("interleaved"):
        return of.stored(k_PCHD), of.stored(v_PCHD)
    if of.dtype == torch.bfloat16:
        # The position behind a row's last shares a word with it, and is to be zero.
        v_PCHD = v_PCHD.nan_to_num(0.0)
    return interleaved(k_PCHD, v_PCHD)


def _exact(
    of: Operands,
    share: ContextShare,
    *,
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in float64, over pools of all ranks."""
    group = of.heads.query // of.heads.kv
    sinks_Q = of.sinks() if share.index == 0 else None
    means_TQD = torch.empty(q_TQD.shape, dtype=torch.float64)
    log_sums_TQ = torch.empty(q_TQD.shape[:2], dtype=torch.float64)
    for row, slot in enumerate(rows.row_slots.tolist()):
        start, end = rows.query_starts[row : row + 2].tolist()
        context = int(rows.context_lens[row])
        at_N = torch.arange(context + end - start)
        pages_N = rows.page_table_XP[slot][at_N // rows.page_size].long()
        k_NQD, v_NQD = (
            pool[pages_N, at_N % rows.page_size].double().repeat_interleave(group, 1)
            for pool in (k_PCHD, v_PCHD)
        )
        scores_QLN = torch.einsum("lqd,nqd->qln", q_TQD[start:end].double(), k_NQD) * scale
        unseen_LN = at_N > at_N[context:, None]
        if of.window is not None:
            unseen_LN |= at_N <= at_N[context:, None] - of.window
        unseen_LN |= at_N // of.heads.page_size % share.ranks != share.index
        scores_QLN = scores_QLN.masked_fill(unseen_LN, -torch.inf)
        sums_QL = scores_QLN.logsumexp(-1)
        if sinks_Q is not None:
            sums_QL = torch.logaddexp(sums_QL, sinks_Q.double()[:, None])
        weights_QLN = (scores_QLN - sums_QL[..., None]).exp().masked_fill(unseen_LN, 0.0)
        means_TQD[start:end] = torch.einsum("qln,nqd->lqd", weights_QLN, v_NQD)
        log_sums_TQ[start:end] = sums_QL.T
    return means_TQD, log_sums_TQ
