"""Attention over paged latents, and writes to them.

The order of all sums stands in `csrc/cpu/latent.inl`. A token's result is the same bits whatever
shares its batch, however its prompt was cut, and whichever threads computed it.

Legend: T tokens, Q query heads, E elements of a latent, V those of them that are its value, P
pages, C positions of a page.
"""

from typing import Final

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.registry import Priority, kernel
from tokenspeed.kernels.rows import PagedRows

__all__ = ["append_latents", "join_heads", "paged_mla"]

_CPU = Capability(device="cpu")
_FORMATS: Final = ("float32", "bfloat16")
_LATENT_DIMS: Final = range(32, 641, 16)


@kernel(
    "attention.join_heads",
    solution="cpu",
    requires=_CPU,
    formats=_FORMATS,
    priority=Priority.NATIVE,
)
def join_heads(
    front_TQA: torch.Tensor, behind_TQB: torch.Tensor, *, runtime: CpuRuntime
) -> torch.Tensor:
    """One pass, token by token."""
    elements = front_TQA.shape[2] + behind_TQB.shape[2]
    joined_TQE = front_TQA.new_empty((*front_TQA.shape[:2], elements))
    # Other kernels may leave a token's heads apart.
    front_TQA, behind_TQB = (
        x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous()
        for x in (front_TQA, behind_TQB)
    )
    _cpu.join(runtime, front_TQA, behind_TQB, joined_TQE)
    return joined_TQE


@kernel(
    "attention.paged_mla",
    solution="cpu",
    requires=_CPU,
    formats=_FORMATS,
    traits={"latent_dim": _LATENT_DIMS, "value_dim": range(32, 641, 32)},
    priority=Priority.NATIVE,
)
def paged_mla(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    value_dim: int,
    runtime: CpuRuntime,
) -> torch.Tensor:
    """Heads and tokens as lanes; blocks of 256 positions, merged from the first to the last."""
    out_TQV = q_TQE.new_empty((*q_TQE.shape[:2], value_dim))
    _cpu.attend_latents(
        runtime,
        q_TQE,
        latents_PCE,
        rows.query_starts,
        rows.context_lens,
        rows.row_slots,
        rows.page_table_XP,
        scale,
        out_TQV,
    )
    return out_TQV


@kernel(
    "kvcache.append_latents",
    solution="cpu",
    requires=_CPU,
    formats=_FORMATS,
    traits={"latent_dim": _LATENT_DIMS},
    priority=Priority.NATIVE,
)
def append_latents(
    latents_TE: torch.Tensor,
    latents_PCE: torch.Tensor,
    kv_slots_T: torch.Tensor,
    *,
    runtime: CpuRuntime,
) -> None:
    """A copy of each row, in the pool's type."""
    _cpu.append_latents(runtime, latents_TE, latents_PCE, kv_slots_T)
