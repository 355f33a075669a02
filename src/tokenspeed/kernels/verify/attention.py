"""Attention over scattered pages and writes to them, in plain and in interleaved pages.

Legend: T tokens, L tokens of a row, N positions of a row, Q query heads, H KV heads, D elements of
a head, P pages, C positions of a page.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.kv_formats import FLOAT8
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.verify.case import (
    TYPES,
    Call,
    Case,
    Compared,
    compare,
    equal,
    named,
    noise,
    stored,
)
from tokenspeed.kernels.verify.paging import row_lengths, scattered_rows

__all__ = [
    "APPENDED",
    "INTERLEAVED_HEADS",
    "ROWS",
    "WINDOWS",
    "Operands",
    "append_cases",
    "exact_attention",
    "interleaved",
    "paged_mha_cases",
    "rotate_and_append_cases",
]

# Types whose elements come whole into 32 bits, which interleaving needs.
_INTERLEAVED_TYPES = (torch.float32, torch.bfloat16)
_LANES = 16
# Below most scores' size, so that it shows.
_SOFT_CAP = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    query: int
    kv: int
    dim: int
    page_size: int

    def __str__(self) -> str:
        return f"{self.query}/{self.kv} heads of {self.dim}, pages of {self.page_size}"


_HEADS = (
    _Heads(query=1, kv=1, dim=8, page_size=5),
    _Heads(query=14, kv=2, dim=20, page_size=16),
    _Heads(query=7, kv=1, dim=16, page_size=16),
    _Heads(query=9, kv=3, dim=64, page_size=32),
    _Heads(query=4, kv=2, dim=80, page_size=48),
    _Heads(query=6, kv=2, dim=128, page_size=32),
)
# Interleaved pages have whole vectors of positions and of elements.
INTERLEAVED_HEADS = tuple(
    heads for heads in _HEADS if heads.dim % _LANES == 0 and heads.page_size % _LANES == 0
)
_Lengths = tuple[tuple[int, int], ...]
# (context, new tokens) of each row.
ROWS = {
    "the first token": ((0, 1),),
    "decode": ((255, 1), (256, 1), (257, 1), (15, 1), (16, 1), (0, 1)),
    "prefill": ((0, 37),),
    "a later chunk": ((29, 5),),
    "mixed": ((700, 3), (0, 9), (520, 30), (1, 1)),
}
# One token, less than a page, more than a block of the native kernel.
WINDOWS = (1, 11, 300)
# What is written at once: a token, decoding, and a chunk beside both.
APPENDED = (((0, 1),), ((255, 1), (256, 1), (16, 1)), ((29, 37), (0, 4), (7, 1)))


@dataclass(frozen=True, slots=True)
class Operands:
    """What a case is made of: rows of (context, new) tokens."""

    format_name: str
    dtype: torch.dtype
    heads: _Heads
    lengths: _Lengths
    window: int | None = None
    has_sinks: bool = False
    soft_cap: float | None = None

    def stored(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers in the type of the format's pages."""
        return stored(x, self.format_name)

    def sinks(self) -> torch.Tensor | None:
        """A sink of each query head, some of which take more than all positions do."""
        if not self.has_sinks:
            return None
        return 4 * noise(self.heads.query, dtype=torch.float32, seed=5)


def paged_mha_cases() -> Iterator[Case]:
    """Decode, prefill and both at once; what no row has written is NaN."""
    for format_name, dtype, heads in _formats():
        for name, lengths in ROWS.items():
            yield Case(
                op="attention.paged_mha",
                format_name=format_name,
                dtype=dtype,
                name=f"{name}, {heads}",
                traits={"head_dim": heads.dim},
                check=partial(_paged_mha, Operands(format_name, dtype, heads, lengths)),
            )
        for window in WINDOWS:
            yield Case(
                op="attention.paged_mha",
                format_name=format_name,
                dtype=dtype,
                name=f"mixed, windows of {window}, {heads}",
                traits={"head_dim": heads.dim},
                check=partial(
                    _paged_mha, Operands(format_name, dtype, heads, ROWS["mixed"], window)
                ),
            )
        yield from _capped_cases(format_name, dtype, heads)
        for of_window in (None, WINDOWS[1]):
            yield Case(
                op="attention.paged_mha",
                format_name=format_name,
                dtype=dtype,
                name=f"mixed, sinks, {heads}" + (f", windows of {of_window}" if of_window else ""),
                traits={"head_dim": heads.dim},
                check=partial(
                    _paged_mha,
                    Operands(format_name, dtype, heads, ROWS["mixed"], of_window, has_sinks=True),
                ),
            )


def _capped_cases(format_name: str, dtype: torch.dtype, heads: _Heads) -> Iterator[Case]:
    for has_sinks in (False, True):
        yield Case(
            op="attention.paged_mha",
            format_name=format_name,
            dtype=dtype,
            name=f"mixed, soft cap{', sinks' if has_sinks else ''}, {heads}",
            traits={"head_dim": heads.dim},
            check=partial(
                _paged_mha,
                Operands(
                    format_name,
                    dtype,
                    heads,
                    ROWS["mixed"],
                    has_sinks=has_sinks,
                    soft_cap=_SOFT_CAP,
                ),
            ),
        )


def append_cases() -> Iterator[Case]:
    """Scattered pages, K and V as views into one product; no other slot may change."""
    for format_name, dtype, heads in _formats():
        for lengths in APPENDED:
            tokens = sum(new for _, new in lengths)
            yield Case(
                op="kvcache.append",
                format_name=format_name,
                dtype=dtype,
                name=f"{tokens} tokens, {heads}",
                traits={"head_dim": heads.dim},
                check=partial(_append, Operands(format_name, dtype, heads, lengths)),
            )


def rotate_and_append_cases() -> Iterator[Case]:
    """As `append_cases`, with queries in front of K in the same product."""
    for format_name, dtype, heads in _formats():
        for lengths in APPENDED if heads.dim % 2 == 0 else ():
            tokens = sum(new for _, new in lengths)
            yield Case(
                op="kvcache.rotate_and_append",
                format_name=format_name,
                dtype=dtype,
                name=f"{tokens} tokens, {heads}",
                traits={"head_dim": heads.dim},
                check=partial(_rotate_and_append, Operands(format_name, dtype, heads, lengths)),
            )


def _formats() -> Iterator[tuple[str, torch.dtype, _Heads]]:
    for heads in _HEADS:
        for dtype in TYPES:
            yield named(dtype), dtype, heads
        yield FLOAT8, torch.bfloat16, heads
        if heads in INTERLEAVED_HEADS:
            for dtype in _INTERLEAVED_TYPES:
                yield f"interleaved_{named(dtype)}", dtype, heads


def interleaved(k_PCHD: torch.Tensor, v_PCHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain pools as interleaved ones; the layout stands in `csrc/cpu/kernels.h`."""
    pages, page_size, heads, dim = k_PCHD.shape
    pair = 4 // k_PCHD.element_size()
    k_PHDC = k_PCHD.permute(0, 2, 3, 1).reshape(pages, heads, dim // pair, pair, page_size)
    v_PHCD = v_PCHD.permute(0, 2, 1, 3).reshape(pages, heads, page_size // pair, pair, dim)
    k_PCHD = k_PHDC.transpose(3, 4).reshape(k_PCHD.shape).contiguous()
    v_PCHD = v_PHCD.transpose(3, 4).reshape(v_PCHD.shape).contiguous()
    return k_PCHD, v_PCHD


def exact_attention(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    window: int | None = None,
    sinks_Q: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """The definition in float64, a row at a time, over plain pools."""
    group = q_TQD.shape[1] // k_PCHD.shape[2]
    out_TQD = torch.empty(q_TQD.shape, dtype=torch.float64)
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
        if soft_cap is not None:
            scores_QLN = soft_cap * torch.tanh(scores_QLN / soft_cap)
        unseen_LN = at_N > at_N[context:, None]
        if window is not None:
            unseen_LN |= at_N <= at_N[context:, None] - window
            # Nobody's number may come through a weight of zero.
            v_NQD[unseen_LN.all(0)] = 0
        scores_QLN = scores_QLN.masked_fill(unseen_LN, -torch.inf)
        if sinks_Q is None:
            weights_QLN = scores_QLN.softmax(-1)
        else:
            sinks_QL1 = sinks_Q.double()[:, None, None].expand(-1, end - start, 1)
            weights_QLN = torch.cat((scores_QLN, sinks_QL1), -1).softmax(-1)[..., :-1]
        out_TQD[start:end] = torch.einsum("qln,nqd->lqd", weights_QLN, v_NQD)
    return out_TQD


def _paged_mha(of: Operands, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    heads = of.heads
    rows, pages = scattered_rows(of.lengths, page_size=heads.page_size, seed=len(of.lengths))
    q_TQD = noise(int(rows.query_starts[-1]), heads.query, heads.dim, dtype=of.dtype)
    shape = (pages, heads.page_size, heads.kv, heads.dim)
    k_PCHD, v_PCHD = (noise(*shape, dtype=of.dtype, seed=seed) for seed in (1, 2))
    # Rounding is no error of attention's: numbers are those that the pages hold.
    k_PCHD, v_PCHD = (of.stored(pool).to(of.dtype) for pool in (k_PCHD, v_PCHD))
    unwritten_PC = torch.ones(shape[:2], dtype=torch.bool)
    for slot, length in row_lengths(rows):
        at_N = torch.arange(length)
        # Pages that a window has left behind are gone.
        context = dict(zip(rows.row_slots.tolist(), rows.context_lens.tolist(), strict=True))[slot]
        hidden = 0 if of.window is None else max(0, context + 1 - of.window)
        at_N = at_N[hidden // heads.page_size * heads.page_size :]
        unwritten_PC[rows.page_table_XP[slot][at_N // heads.page_size], at_N % heads.page_size] = 0
    for pool in (k_PCHD, v_PCHD):
        pool[unwritten_PC] = torch.nan
    scale = 1.3 / math.sqrt(heads.dim)
    terms: dict[str, Any] = {"window": of.window, "sinks_Q": of.sinks(), "soft_cap": of.soft_cap}
    exact_TQD = exact_attention(q_TQD, k_PCHD, v_PCHD, rows, scale, **terms)
    pools = [of.stored(pool) for pool in _laid_out(of, k_PCHD, v_PCHD, rows)]
    found_TQD = kernel(q_TQD, *pools, rows, scale, **terms)
    yield compare("out", found_TQD, exact_TQD, of.dtype)


def _append(of: Operands, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    heads = of.heads
    rows, pages = scattered_rows(of.lengths, page_size=heads.page_size, seed=len(of.lengths))
    slots_T = rows.kv_slots_T
    both = noise(len(slots_T), 2 * heads.kv + 1, heads.dim, dtype=of.dtype)
    k_THD, v_THD = both[:, : heads.kv], both[:, heads.kv + 1 :]
    shape = (pages, heads.page_size, heads.kv, heads.dim)
    # Some lie beyond what eight bits hold.
    both[0] *= 300
    k_PCHD, v_PCHD = (of.stored(noise(*shape, dtype=of.dtype, seed=seed)) for seed in (1, 2))
    plain = k_PCHD, v_PCHD
    pools = [pool.clone() for pool in _laid_out(of, *plain, rows)]
    kernel(k_THD, v_THD, *pools, slots_T)
    for pool, new_THD in zip(plain, (k_THD, v_THD), strict=True):
        pool.flatten(0, 1)[slots_T] = of.stored(new_THD)
    for what, pool, exact in zip("KV", pools, _laid_out(of, *plain, rows), strict=True):
        yield equal(f"the pool of {what}", pool, exact)


def _rotate_and_append(of: Operands, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    """Queries by the formula; pools by the same in the arithmetic of `rope.rotate`, whose rounding
    what is written has."""
    heads = of.heads
    rows, count = scattered_rows(of.lengths, page_size=heads.page_size, seed=len(of.lengths))
    slots_T = rows.kv_slots_T
    all_TXD = noise(len(slots_T), heads.query + 2 * heads.kv, heads.dim, dtype=of.dtype)
    all_TXD[0] *= 300
    q_TQD, k_THD, v_THD = torch.split(all_TXD, [heads.query, heads.kv, heads.kv], dim=1)
    shape = (count, heads.page_size, heads.kv, heads.dim)
    pools = [of.stored(noise(*shape, dtype=of.dtype, seed=seed)) for seed in (1, 2)]
    exact = [pool.clone() for pool in pools]
    turns_TE = noise(len(slots_T), heads.dim // 2, dtype=torch.float32, seed=3) * 100
    cos_TE, sin_TE = turns_TE.cos(), turns_TE.sin()
    turn_T1E = torch.complex(cos_TE.double(), sin_TE.double())[:, None]
    turned_TXE = torch.complex(*all_TXD.double().chunk(2, -1)) * turn_T1E
    turned_TXD = torch.cat((turned_TXE.real, turned_TXE.imag), -1)
    pages = {"k_PCHD": pools[0], "v_PCHD": pools[1], "kv_slots_T": slots_T}
    found_TQD = kernel(q_TQD, k_THD, v_THD, cos_TE, sin_TE, **pages)
    yield compare("q", found_TQD, turned_TXD[:, : heads.query], of.dtype)
    k_exact_THD = turned_TXD[:, heads.query : -heads.kv]
    at_slots = [pool.flatten(0, 1)[slots_T] for pool in pools]
    within = torch.finfo(torch.float8_e4m3fn).max if of.format_name == FLOAT8 else math.inf
    written = at_slots[0].to(of.dtype)
    yield compare("K", written, k_exact_THD.clamp(-within, within), of.dtype)
    exact[0].flatten(0, 1)[slots_T] = at_slots[0]
    exact[1].flatten(0, 1)[slots_T] = of.stored(v_THD)
    for what, pool, wanted in zip("KV", pools, exact, strict=True):
        yield equal(f"the pool of {what}", pool, wanted)


def _laid_out(
    of: Operands, k_PCHD: torch.Tensor, v_PCHD: torch.Tensor, rows: PagedRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain pools as the format has them."""
    if not of.format_name.startswith("interleaved"):
        return k_PCHD, v_PCHD
    if v_PCHD.element_size() == 2:
        # Two positions of V share 32 bits, so attention reads the one behind a row's last and
        # multiplies it by 0: the format wants a number there, and that it is zero.
        v_PCHD = v_PCHD.clone()
        for slot, length in row_lengths(rows):
            if length % 2:
                page = rows.page_table_XP[slot][length // rows.page_size]
                v_PCHD[page, length % rows.page_size] = 0
    return interleaved(k_PCHD, v_PCHD)
