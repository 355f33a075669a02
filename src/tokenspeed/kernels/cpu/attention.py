"""Attention over interleaved KV pages, and writes to them.

The layout of a page and the order of all sums stand in `csrc/cpu/kernels.h` and
`csrc/cpu/attention.inl`. A token's result is the same bits whatever shares its batch, however its
prompt was cut, and whichever threads computed it.

Legend: T tokens, Q query heads, H KV heads, D elements of a head, X of a part of an attention,
P pages, C positions of a page.
"""

from typing import Final

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.kv_formats import ROUNDED
from tokenspeed.kernels.registry import Priority, kernel
from tokenspeed.kernels.rows import PagedRows

__all__ = ["append", "paged_mha", "partial_mha"]

_CPU = Capability(device="cpu")
_FORMATS: Final = ("interleaved_float32", "interleaved_bfloat16", ROUNDED)
_HEAD_DIMS: Final = range(16, 257, 16)


@kernel(
    "attention.paged_mha",
    solution="cpu",
    requires=_CPU,
    formats=_FORMATS,
    traits={"head_dim": _HEAD_DIMS},
    priority=Priority.NATIVE,
)
def paged_mha(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    window: int | None = None,
    sinks_Q: torch.Tensor | None = None,
    soft_cap: float | None = None,
    runtime: CpuRuntime,
) -> torch.Tensor:
    """Blocks of 256 positions, softmax over each, merged from the first to the last."""
    out_TQD = q_TQD.new_empty(q_TQD.shape)
    _cpu.attend(
        runtime,
        q_TQD,
        k_PCHD,
        v_PCHD,
        rows.query_starts,
        rows.context_lens,
        rows.row_slots,
        rows.page_table_XP,
        scale,
        window or 0,
        soft_cap or 0.0,
        sinks_Q,
        out_TQD,
    )
    return out_TQD


@kernel(
    "attention.partial_mha",
    solution="cpu",
    requires=_CPU,
    formats=_FORMATS,
    traits={"head_dim": _HEAD_DIMS},
    priority=Priority.NATIVE,
)
def partial_mha(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    window: int | None = None,
    sinks_Q: torch.Tensor | None = None,
    runtime: CpuRuntime,
) -> torch.Tensor:
    """As `paged_mha`, in blocks of 256 of the positions that are here."""
    tokens, heads, _ = q_TQD.shape
    out_TQD = torch.empty(q_TQD.shape, dtype=torch.float32)
    log_sums_TQ1 = torch.empty(tokens, heads, 1, dtype=torch.float32)
    _cpu.attend(
        runtime,
        q_TQD,
        k_PCHD,
        v_PCHD,
        rows.query_starts,
        rows.context_lens,
        rows.row_slots,
        rows.page_table_XP,
        scale,
        0,
        0.0,
        sinks_Q if rows.has_sinks else None,
        out_TQD,
        rows.seen(window).reshape(-1),
        log_sums_TQ1,
    )
    return torch.cat((out_TQD, log_sums_TQ1), dim=-1)


@kernel(
    "kvcache.append",
    solution="cpu",
    requires=_CPU,
    formats=_FORMATS,
    traits={"head_dim": _HEAD_DIMS},
    priority=Priority.NATIVE,
)
def append(
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    kv_slots_T: torch.Tensor,
    *,
    k_offset_HD: torch.Tensor | None = None,
    runtime: CpuRuntime,
) -> None:
    """Four bytes of K and one, two or four of V at a time."""
    _cpu.append(runtime, k_THD, v_THD, k_PCHD, v_PCHD, kv_slots_T, k_offset_HD)
