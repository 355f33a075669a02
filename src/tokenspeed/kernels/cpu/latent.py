"""Attention over paged latents, and writes to them.

The order of all sums stands in `csrc/cpu/latent.inl`. A token's result is the same bits whatever
shares its batch, however its prompt was cut, and whichever threads computed it.

Legend: T tokens, Q query heads, E elements of a latent, V those of them that are its value (in
`project_parts` elements of a head's value, L those of a latent's), X of a part of an attention,
P pages, C positions of a page.
"""

from typing import Final

import numpy as np
import torch

from tokenspeed import _cpu
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.ops.gemm import HeadMatrices
from tokenspeed.kernels.registry import Priority, kernel
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.weights import PANELS

__all__ = ["append_latents", "join_heads", "paged_mla", "partial_mla", "project_parts"]

_CPU = Capability(device="cpu")
_FORMATS: Final = ("float32", "bfloat16")
_LATENT_DIMS: Final = range(32, 641, 16)
_TRAITS: Final = {"latent_dim": _LATENT_DIMS, "value_dim": range(32, 641, 32)}


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
    traits=_TRAITS,
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
    "attention.partial_mla",
    solution="cpu",
    requires=_CPU,
    formats=_FORMATS,
    traits=_TRAITS,
    priority=Priority.NATIVE,
)
def partial_mla(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    value_dim: int,
    runtime: CpuRuntime,
) -> torch.Tensor:
    """As `paged_mla`, in blocks of 256 of the positions that are here."""
    tokens, heads, _ = q_TQE.shape
    out_TQV = torch.empty(tokens, heads, value_dim, dtype=torch.float32)
    log_sums_TQ1 = torch.empty(tokens, heads, 1, dtype=torch.float32)
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
        np.ascontiguousarray(rows.seen(None)[:, 1]),
        log_sums_TQ1,
    )
    return torch.cat((out_TQV, log_sums_TQ1), dim=-1)


@kernel(
    "attention.project_parts",
    solution="cpu",
    requires=_CPU,
    formats=PANELS,
    priority=Priority.NATIVE,
)
def project_parts(
    parts_TQX: torch.Tensor, weight_QVL: HeadMatrices, *, runtime: CpuRuntime
) -> torch.Tensor:
    """Products as `gemm.heads` makes them, of means rounded to the weight's type, as one rank's
    are; they stay float32."""
    assert not isinstance(weight_QVL, torch.Tensor)
    means_TQL = parts_TQX[..., :-1].to(weight_QVL[0].dtype)
    made_TQX = parts_TQX.new_empty((*parts_TQX.shape[:2], weight_QVL[0].shape[0] + 1))
    for head, weight_VL in enumerate(weight_QVL):
        _cpu.linear(runtime, means_TQL[:, head], weight_VL.matrices, None, made_TQX[:, head, :-1])
    made_TQX[..., -1] = parts_TQX[..., -1]
    return made_TQX


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
