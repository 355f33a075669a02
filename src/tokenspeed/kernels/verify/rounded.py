"""Attention over rounded pages and writes to them.

Legend: T tokens, Q query heads, H KV heads, D elements of a head, P pages, C positions of a page.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.kv_formats import ROUNDED
from tokenspeed.kernels.reference.rounded import append_rounded, read_rounded
from tokenspeed.kernels.verify.attention import (
    APPENDED,
    INTERLEAVED_HEADS,
    ROWS,
    WINDOWS,
    Operands,
    exact_attention,
)
from tokenspeed.kernels.verify.case import Call, Case, Compared, compare, equal, noise
from tokenspeed.kernels.verify.paging import scattered_rows, written_slots

__all__ = ["append_cases", "paged_mha_cases"]

_TYPES = (torch.float32, torch.bfloat16)
_SCALE_SIZE_BYTES = 4


def paged_mha_cases() -> Iterator[Case]:
    """Decode, prefill and both at once; scales that no row has written are NaN."""
    kinds: list[tuple[str, tuple[tuple[int, int], ...], int | None]]
    kinds = [(name, lengths, None) for name, lengths in ROWS.items()]
    kinds += [(f"mixed, windows of {window}", ROWS["mixed"], window) for window in WINDOWS]
    for heads in INTERLEAVED_HEADS:
        for dtype in _TYPES:
            for name, lengths, window in kinds:
                yield Case(
                    op="attention.paged_mha",
                    format_name=ROUNDED,
                    dtype=dtype,
                    name=f"{name}, {heads}",
                    traits={"head_dim": heads.dim},
                    check=partial(_paged_mha, Operands(ROUNDED, dtype, heads, lengths, window)),
                )
            yield Case(
                op="attention.paged_mha",
                format_name=ROUNDED,
                dtype=dtype,
                name=f"mixed, sinks, {heads}",
                traits={"head_dim": heads.dim},
                check=partial(
                    _paged_mha, Operands(ROUNDED, dtype, heads, ROWS["mixed"], has_sinks=True)
                ),
            )


def append_cases() -> Iterator[Case]:
    """Scattered pages, with an offset of K and without; no other slot may change."""
    for heads in INTERLEAVED_HEADS:
        for dtype in _TYPES:
            for lengths in APPENDED:
                tokens = sum(new for _, new in lengths)
                for has_offset in (False, True):
                    yield Case(
                        op="kvcache.append",
                        format_name=ROUNDED,
                        dtype=dtype,
                        name=f"{tokens} tokens{', an offset' * has_offset}, {heads}",
                        traits={"head_dim": heads.dim},
                        check=partial(
                            _append, Operands(ROUNDED, dtype, heads, lengths), has_offset
                        ),
                    )


def _pool(of: Operands, pages: int) -> torch.Tensor:
    """Bytes that no one has written, all ones, which as a scale are no number."""
    heads = of.heads
    shape = (pages, heads.page_size, heads.kv, heads.dim + _SCALE_SIZE_BYTES)
    return torch.full(shape, -1, dtype=torch.int8)


def _paged_mha(of: Operands, kernel: Call, runtime: CpuRuntime) -> Iterator[Compared]:
    heads = of.heads
    rows, pages = scattered_rows(of.lengths, page_size=heads.page_size, seed=len(of.lengths))
    written = written_slots(rows)
    pools = _pool(of, pages), _pool(of, pages)
    k_THD, v_THD = (
        noise(len(written), heads.kv, heads.dim, dtype=torch.float32, seed=seed) for seed in (1, 2)
    )
    append_rounded(k_THD, v_THD, *pools, written)
    q_TQD = noise(int(rows.query_starts[-1]), heads.query, heads.dim, dtype=of.dtype)
    scale = 1.3 / math.sqrt(heads.dim)
    how: dict[str, Any] = {"window": of.window, "sinks_Q": of.sinks()}
    exact_TQD = exact_attention(q_TQD, *read_rounded(*pools), rows, scale, **how)
    found_TQD = kernel(q_TQD, *pools, rows, scale, **how)
    yield compare("out", found_TQD, exact_TQD, of.dtype)


def _append(
    of: Operands, has_offset: bool, kernel: Call, runtime: CpuRuntime
) -> Iterator[Compared]:
    heads = of.heads
    rows, pages = scattered_rows(of.lengths, page_size=heads.page_size, seed=len(of.lengths))
    slots_T = rows.kv_slots_T
    both = noise(len(slots_T), 2 * heads.kv + 1, heads.dim, dtype=of.dtype)
    k_THD, v_THD = both[:, : heads.kv], both[:, heads.kv + 1 :]
    offset_HD = 50 * noise(heads.kv, heads.dim, dtype=of.dtype, seed=1) if has_offset else None
    if offset_HD is not None:
        k_THD = k_THD + offset_HD
    pools, before = ((_pool(of, pages), _pool(of, pages)) for _ in range(2))
    kernel(k_THD, v_THD, *pools, slots_T, k_offset_HD=offset_HD)
    plain = [pool_PCHD.flatten(0, 1)[slots_T] for pool_PCHD in read_rounded(*pools)]
    exact_THD = k_THD.double() - (0 if offset_HD is None else offset_HD.double())
    # K is as exact as its steps where it was rounded: transformed.
    yield _in_steps("K", plain[0], exact_THD, _transform(heads.dim))
    yield _in_steps("V", plain[1], v_THD.double(), torch.eye(heads.dim, dtype=torch.float64))
    # With the written slots made the same, nothing else may differ.
    zeros_THD = torch.zeros(k_THD.shape)
    for target in (pools, before):
        append_rounded(zeros_THD, zeros_THD, *target, slots_T)
    for what, pool, exact in zip("KV", pools, before, strict=True):
        yield equal(f"the rest of the pool of {what}", pool, exact)


def _in_steps(
    what: str, plain_THD: torch.Tensor, exact_THD: torch.Tensor, basis_DD: torch.Tensor
) -> Compared:
    """How far numbers are off, in steps of their position and head where they were rounded."""
    exact_THD = exact_THD @ basis_DD
    steps_TH = exact_THD.abs().amax(-1) / 127
    off_THD = (plain_THD.double() @ basis_DD - exact_THD).abs() / steps_TH[..., None]
    return Compared(what=what, error=float(off_THD.nan_to_num(torch.inf).max()))


def _transform(dim: int) -> torch.Tensor:
    """Sylvester's matrix of the largest power of two that divides dim, along the diagonal."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while dim % (2 * len(block)) == 0:
        block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), block)
    return torch.kron(torch.eye(dim // len(block), dtype=torch.float64), block)
