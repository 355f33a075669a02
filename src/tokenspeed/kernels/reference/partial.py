"""Attention over a rank's share of each context, one row after the other.

Legend: T tokens, L tokens of a row, N positions of a row that are here and that some token of it
sees, Q query heads, H KV heads, D elements of a head, X of a part of an attention, P pages,
C positions of a page, E elements of a latent, V those of them that are its value (in
`project_parts` elements of a head's value, L those of a latent's).
"""

from collections.abc import Callable
from typing import Final

import torch

from tokenspeed.kernels.kv_formats import FLOAT8, ROUNDED
from tokenspeed.kernels.reference.gemm import DENSE, heads
from tokenspeed.kernels.reference.rounded import HEAD_DIMS, read_rounded
from tokenspeed.kernels.registry import ANY, Priority, kernel
from tokenspeed.kernels.rows import PagedRows

__all__ = ["partial_mha", "partial_mha_rounded", "partial_mla", "project_parts"]

_Read = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
_NAME: Final = "attention.partial_mha"


@kernel(
    _NAME,
    solution="reference",
    formats=(*DENSE, FLOAT8),
    traits={"head_dim": ANY},
    priority=Priority.REFERENCE,
    batch_dependent=True,
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
) -> torch.Tensor:
    """Scores in float32, their logarithmic sum, and what softmax by that sum gives."""
    return _parts(
        q_TQD,
        k_PCHD,
        v_PCHD,
        rows,
        scale,
        read=_as_they_are,
        window=window,
        sinks_Q=sinks_Q,
        value_dim=q_TQD.shape[2],
    )


@kernel(
    _NAME,
    solution="reference",
    formats=(ROUNDED,),
    traits={"head_dim": HEAD_DIMS},
    priority=Priority.REFERENCE,
    batch_dependent=True,
)
def partial_mha_rounded(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    window: int | None = None,
    sinks_Q: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `partial_mha`, of pages whose rounding and transform are undone."""
    return _parts(
        q_TQD,
        k_PCHD,
        v_PCHD,
        rows,
        scale,
        read=read_rounded,
        window=window,
        sinks_Q=sinks_Q,
        value_dim=q_TQD.shape[2],
    )


@kernel(
    "attention.partial_mla",
    solution="reference",
    formats=(*DENSE, FLOAT8),
    traits={"latent_dim": ANY, "value_dim": ANY},
    priority=Priority.REFERENCE,
    batch_dependent=True,
)
def partial_mla(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    value_dim: int,
) -> torch.Tensor:
    """As `partial_mha`, over one KV head whose values are the first elements of its keys."""
    k_PCHE = latents_PCE.unsqueeze(2)
    v_PCHV = k_PCHE[..., :value_dim]
    return _parts(
        q_TQE,
        k_PCHE,
        v_PCHV,
        rows,
        scale,
        read=_as_they_are,
        window=None,
        sinks_Q=None,
        value_dim=value_dim,
    )


@kernel(
    "attention.project_parts",
    solution="reference",
    formats=DENSE,
    priority=Priority.REFERENCE,
    batch_dependent=True,
)
def project_parts(parts_TQX: torch.Tensor, weight_QVL: torch.Tensor) -> torch.Tensor:
    """A batch of products, one a head, in the weight's type."""
    means_TQV = heads(parts_TQX[..., :-1].to(weight_QVL.dtype), weight_QVL)
    return torch.cat((means_TQV.float(), parts_TQX[..., -1:]), dim=-1)


def _as_they_are(k_PCHD: torch.Tensor, v_PCHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return k_PCHD, v_PCHD


def _parts(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    read: _Read,
    window: int | None,
    sinks_Q: torch.Tensor | None,
    value_dim: int,
) -> torch.Tensor:
    shape = (*q_TQD.shape[:2], value_dim + 1)
    parts_TQX = q_TQD.new_empty(shape, dtype=torch.float32)
    seen_T2 = torch.from_numpy(rows.seen(window)).to(q_TQD.device)
    starts = rows.query_starts.tolist()
    for start, end, slot in zip(starts, starts[1:], rows.row_slots.tolist(), strict=False):
        first, last = int(seen_T2[start, 0]), int(seen_T2[end - 1, 1])
        # Pages behind the window of the row's first token may be anybody's by now.
        hidden = first // rows.page_size
        pages_P = rows.page_table_XP[slot, hidden : -(-last // rows.page_size)]
        first = hidden * rows.page_size
        k_HND, v_HND = (
            found_PCHD.flatten(0, 1)[: max(0, last - first)].float().transpose(0, 1)
            for found_PCHD in read(k_PCHD[pages_P], v_PCHD[pages_P])
        )
        keys_1N = torch.arange(first, max(first, last), device=q_TQD.device)[None, :]
        from_L1, to_L1 = seen_T2[start:end].unsqueeze(-1).unbind(1)
        hidden_LN = (keys_1N < from_L1) | (keys_1N >= to_L1)
        q_QLD = q_TQD[start:end].float().transpose(0, 1)
        scores_QLN = _by_kv_head(q_QLD, k_HND.transpose(1, 2) * scale)
        scores_QLN = scores_QLN.masked_fill(hidden_LN, -torch.inf)
        # What nobody sees may be no number, and 0 times that is none either.
        v_HND = v_HND.masked_fill(hidden_LN.all(0)[:, None], 0.0)
        sums_QL1 = scores_QLN.logsumexp(-1, keepdim=True)
        if sinks_Q is not None and rows.has_sinks:
            sums_QL1 = torch.logaddexp(sums_QL1, sinks_Q.float()[:, None, None])
        weights_QLN = (scores_QLN - sums_QL1).exp().masked_fill(hidden_LN, 0.0)
        parts_TQX[start:end, :, :-1] = _by_kv_head(weights_QLN, v_HND).transpose(0, 1)
        parts_TQX[start:end, :, -1:] = sums_QL1.transpose(0, 1)
    return parts_TQX


def _by_kv_head(x_QLA: torch.Tensor, kv_HAB: torch.Tensor) -> torch.Tensor:
    """Products [Q, L, B] of query heads with what their KV head has, without copies of it."""
    query_heads, tokens, elements = x_QLA.shape
    group_rows = query_heads * tokens // len(kv_HAB)
    made_HMB = torch.bmm(x_QLA.reshape(len(kv_HAB), group_rows, elements), kv_HAB)
    return made_HMB.view(query_heads, tokens, kv_HAB.shape[2])
