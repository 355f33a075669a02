"""Attention over paged latents and writes to them.

Legend: T tokens, N positions of a row, Q query heads, E elements of a latent, P pages, C positions
of a page.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.kv_formats import FLOAT8
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.verify.attention import APPENDED, ROWS
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
from tokenspeed.kernels.verify.paging import scattered_rows, written_slots

__all__ = [
    "LATENT_FORMATS",
    "LATENT_SHAPES",
    "LatentShape",
    "append_latents_cases",
    "join_heads_cases",
    "paged_mla_cases",
    "prompt_mla_cases",
]


# Tokens, heads, and elements of both halves.
_JOINED = ((1, 1, 32, 16), (5, 3, 1, 7), (40, 16, 64, 32))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """Sizes of an attention over latents: heads, elements of a latent and of its value."""

    heads: int
    latent: int
    value: int
    page_size: int

    def __str__(self) -> str:
        return f"{self.heads} heads, latents of {self.latent}, pages of {self.page_size}"


LATENT_SHAPES = (
    LatentShape(heads=1, latent=12, value=8, page_size=5),
    LatentShape(heads=3, latent=48, value=32, page_size=16),
    LatentShape(heads=16, latent=576, value=512, page_size=32),
    LatentShape(heads=35, latent=144, value=96, page_size=7),
)


LATENT_FORMATS = (*((named(dtype), dtype) for dtype in TYPES), (FLOAT8, torch.bfloat16))


def paged_mla_cases() -> Iterator[Case]:
    """Decode, prefill and both at once; what no row has written is NaN."""
    for shape in LATENT_SHAPES:
        for format_name, dtype in LATENT_FORMATS:
            for name, lengths in ROWS.items():
                yield Case(
                    op="attention.paged_mla",
                    format_name=format_name,
                    dtype=dtype,
                    name=f"{name}, {shape}",
                    traits={"latent_dim": shape.latent, "value_dim": shape.value},
                    check=partial(_paged_mla, shape, (format_name, dtype), lengths),
                )


# Heads, elements not rotated and rotated, compressed KV, elements of a value; positions of a page.
_PROMPT_SHAPES = (((1, 4, 4, 8, 6), 5), ((3, 20, 12, 32, 24), 16), ((2, 128, 64, 512, 128), 64))
# Tokens before, and new ones.
_PROMPTS = ((0, 1), (0, 37), (70, 33), (300, 130))


def prompt_mla_cases() -> Iterator[Case]:
    """Prompts with and without a cached part; what no row has written is NaN."""
    for sizes, page_size in _PROMPT_SHAPES:
        heads, _, rotated, rank, _ = sizes
        for format_name, dtype in LATENT_FORMATS:
            for context, new in _PROMPTS:
                yield Case(
                    op="attention.prompt_mla",
                    format_name=format_name,
                    dtype=dtype,
                    name=f"{new} behind {context}, {heads} heads, latents of {rank} + {rotated}, "
                    f"pages of {page_size}",
                    traits={"latent_dim": rank + rotated, "value_dim": rank},
                    check=partial(
                        _prompt_mla, sizes, (format_name, dtype), (context, new, page_size)
                    ),
                )


def join_heads_cases() -> Iterator[Case]:
    """Heads of any sizes; tokens lie in wider rows."""
    for dtype in TYPES:
        for sizes in _JOINED:
            tokens, heads, front, behind = sizes
            yield Case(
                op="attention.join_heads",
                format_name=named(dtype),
                dtype=dtype,
                name=f"{tokens} x {heads} x ({front} + {behind})",
                check=partial(_join_heads, sizes, dtype),
            )


def _join_heads(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, kernel: Call, runtime: CpuRuntime
) -> Iterator[Compared]:
    tokens, heads, front, behind = sizes
    front_TQA = noise(tokens, heads + 1, front, dtype=dtype)[:, 1:]
    behind_TQB = noise(tokens, heads + 2, behind, dtype=dtype, seed=1)[:, :heads]
    exact = torch.cat((front_TQA, behind_TQB), dim=-1)
    yield equal("heads", kernel(front_TQA, behind_TQB), exact)
    apart = front_TQA.transpose(0, 1).contiguous().transpose(0, 1)
    yield equal("heads that lie apart", kernel(apart, behind_TQB), exact)


def append_latents_cases() -> Iterator[Case]:
    """Scattered pages, latents as views into wider rows; no other slot may change."""
    for shape in LATENT_SHAPES:
        for format_name, dtype in LATENT_FORMATS:
            for lengths in APPENDED:
                yield Case(
                    op="kvcache.append_latents",
                    format_name=format_name,
                    dtype=dtype,
                    name=f"{sum(new for _, new in lengths)} tokens, {shape}",
                    traits={"latent_dim": shape.latent},
                    check=partial(_append_latents, shape, (format_name, dtype), lengths),
                )


def _paged_mla(
    shape: LatentShape,
    kind: tuple[str, torch.dtype],
    lengths: tuple[tuple[int, int], ...],
    kernel: Call,
    runtime: CpuRuntime,
) -> Iterator[Compared]:
    format_name, dtype = kind
    rows, pages = scattered_rows(lengths, page_size=shape.page_size, seed=len(lengths))
    q_TQE = noise(int(rows.query_starts[-1]), shape.heads, shape.latent, dtype=dtype)
    latents_PCE = torch.full((pages, shape.page_size, shape.latent), torch.nan, dtype=dtype)
    written = written_slots(rows)
    latents_NE = noise(len(written), shape.latent, dtype=dtype, seed=1)
    # Rounding is no error of attention's: numbers are those that the pages hold.
    latents_PCE.flatten(0, 1)[written] = stored(latents_NE, format_name).to(dtype)
    scale = 1.3 / math.sqrt(shape.latent)
    exact_TQV = _exact(q_TQE, latents_PCE, rows, scale, shape.value)
    found_TQV = kernel(q_TQE, stored(latents_PCE, format_name), rows, scale, value_dim=shape.value)
    yield compare("out", found_TQV, exact_TQV, dtype)


def _exact(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    scale: float,
    value_dim: int,
) -> torch.Tensor:
    """The definition in float64, a row at a time."""
    found = []
    for row, slot in enumerate(rows.row_slots.tolist()):
        start, end = rows.query_starts[row : row + 2].tolist()
        context = int(rows.context_lens[row])
        at_N = torch.arange(context + end - start)
        pages_N = rows.page_table_XP[slot][at_N // rows.page_size].long()
        latents_NE = latents_PCE[pages_N, at_N % rows.page_size].double()
        scores_QLN = torch.einsum("lqe,ne->qln", q_TQE[start:end].double(), latents_NE) * scale
        later_LN = at_N > at_N[context:, None]
        weights_QLN = scores_QLN.masked_fill(later_LN, -torch.inf).softmax(-1)
        found.append(torch.einsum("qln,nv->lqv", weights_QLN, latents_NE[:, :value_dim]))
    return torch.cat(found)


def _prompt_mla(
    sizes: tuple[int, int, int, int, int],
    kind: tuple[str, torch.dtype],
    places: tuple[int, int, int],
    kernel: Call,
    runtime: CpuRuntime,
) -> Iterator[Compared]:
    heads, plain, rotated, rank, value = sizes
    format_name, dtype = kind
    context, new, page_size = places
    rows, count = scattered_rows(((context, new),), page_size=page_size, seed=new)
    latents_PCE = torch.full((count, page_size, rank + rotated), torch.nan, dtype=dtype)
    written = written_slots(rows)
    latents_NE = noise(len(written), rank + rotated, dtype=dtype, seed=1)
    latents_PCE.flatten(0, 1)[written] = stored(latents_NE, format_name).to(dtype)
    q_LHD = noise(new, heads, plain + rotated, dtype=dtype)
    k_up_HKN = noise(heads, rank, plain, dtype=dtype, seed=2) / math.sqrt(rank)
    v_up_HVK = noise(heads, value, rank, dtype=dtype, seed=3) / math.sqrt(rank)
    scale = 1.3 / math.sqrt(plain + rotated)
    in_order_NE = latents_PCE.flatten(0, 1)[written].double()
    keys_NHN = torch.einsum("nk,hkp->nhp", in_order_NE[:, :rank], k_up_HKN.double())
    shared_NHR = in_order_NE[:, None, rank:].expand(-1, heads, -1)
    keys_NHD = torch.cat((keys_NHN, shared_NHR), dim=-1)
    scores_HLN = torch.einsum("lhd,nhd->hln", q_LHD.double(), keys_NHD) * scale
    at_N = torch.arange(context + new)
    scores_HLN = scores_HLN.masked_fill(at_N > at_N[context:, None], -torch.inf)
    values_NHV = torch.einsum("nk,hvk->nhv", in_order_NE[:, :rank], v_up_HVK.double())
    exact_LHV = torch.einsum("hln,nhv->lhv", scores_HLN.softmax(-1), values_NHV)
    found_LHV = kernel(
        *(q_LHD, k_up_HKN, v_up_HVK),
        stored(latents_PCE, format_name),
        rows.page_table_XP[int(rows.row_slots[0])],
        context_len=context,
        scale=scale,
    )
    yield compare("out", found_LHV, exact_LHV, dtype)


def _append_latents(
    shape: LatentShape,
    kind: tuple[str, torch.dtype],
    lengths: tuple[tuple[int, int], ...],
    kernel: Call,
    runtime: CpuRuntime,
) -> Iterator[Compared]:
    format_name, dtype = kind
    rows, pages = scattered_rows(lengths, page_size=shape.page_size, seed=len(lengths))
    slots_T = rows.kv_slots_T
    latents_TE = noise(len(slots_T), shape.latent + 5, dtype=dtype)[:, 5:]
    pool_PCE = stored(noise(pages, shape.page_size, shape.latent, dtype=dtype, seed=1), format_name)
    exact_PCE = pool_PCE.clone()
    kernel(latents_TE, pool_PCE, slots_T)
    exact_PCE.flatten(0, 1)[slots_T] = stored(latents_TE, format_name)
    yield equal("the pool", pool_PCE, exact_PCE)
