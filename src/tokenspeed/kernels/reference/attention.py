"""Attention over paged KV, one row after the other.

Legend: T tokens, L tokens of a row, N positions a row has in the cache, Q query heads, H KV
heads, G query heads of a KV head, D elements of a head, P pages, C positions of a page.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tokenspeed.kernels.kv_formats import FLOAT8
from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.registry import ANY, Priority, kernel
from tokenspeed.kernels.rows import PagedRow, PagedRows

__all__ = ["attend", "paged_mha"]


@kernel(
    "attention.paged_mha",
    solution="reference",
    formats=(*DENSE, FLOAT8),
    traits={"head_dim": ANY},
    priority=Priority.REFERENCE,
    batch_dependent=True,
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
) -> torch.Tensor:
    """Gather each row's pages, then attend in float32 with a mask that says who sees what.

    PyTorch's attention would take bfloat16 too, but rounds the probabilities to it, and on a
    CPU is no faster for that.
    """
    return attend(
        q_TQD,
        k_PCHD,
        v_PCHD,
        rows,
        scale,
        read=_as_they_are,
        window=window,
        sinks_Q=sinks_Q,
        soft_cap=soft_cap,
    )


def attend(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    read: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    window: int | None,
    sinks_Q: torch.Tensor | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Attention of each row over its pages, which `read` turns into plain numbers."""
    heads, head_dim = k_PCHD.shape[2], q_TQD.shape[2]
    group = q_TQD.shape[1] // heads
    out_TQD = torch.empty_like(q_TQD, memory_format=torch.contiguous_format)
    for row in rows.by_row:
        length = row.context_len + row.end - row.start
        # Pages behind the window of the row's first token may be anybody's by now.
        hidden = 0 if window is None else max(0, row.context_len + 1 - window)
        pages = hidden // rows.page_size
        first = pages * rows.page_size
        pages_P = row.pages_P[pages:]
        k_HND, v_HND = (
            found_PCHD.flatten(0, 1)[: length - first].float().transpose(0, 1)[None]
            for found_PCHD in read(k_PCHD[pages_P], v_PCHD[pages_P])
        )
        allowed_LN = _within(row, first, window)
        q_LQD = q_TQD[row.start : row.end].float()
        if sinks_Q is not None or soft_cap is not None:
            out_TQD[row.start : row.end] = _written_out(
                q_LQD,
                k_HND[0],
                v_HND[0],
                allowed_LN,
                scale=scale,
                sinks_Q=sinks_Q,
                soft_cap=soft_cap,
            )
        elif allowed_LN is None:
            # The query heads of a KV head stand where tokens would: K and V are read once.
            q_HGD = q_LQD.reshape(heads, group, head_dim)
            out_HGD = F.scaled_dot_product_attention(q_HGD[None], k_HND, v_HND, scale=scale)
            out_TQD[row.start] = out_HGD.reshape(-1, head_dim)
        else:
            out_1QLD = F.scaled_dot_product_attention(
                q_LQD.transpose(0, 1)[None],
                k_HND,
                v_HND,
                attn_mask=allowed_LN,
                scale=scale,
                enable_gqa=True,
            )
            out_TQD[row.start : row.end] = out_1QLD[0].transpose(0, 1)
    return out_TQD


def _written_out(
    q_LQD: torch.Tensor,
    k_HND: torch.Tensor,
    v_HND: torch.Tensor,
    allowed_LN: torch.Tensor | None,
    *,
    scale: float,
    sinks_Q: torch.Tensor | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """out_LQD where scores are capped, or each head has one score more whose part of the softmax
    is left out.
    """
    group = q_LQD.shape[1] // len(k_HND)
    k_QND, v_QND = (of_HND.repeat_interleave(group, dim=0) for of_HND in (k_HND, v_HND))
    scores_QLN = q_LQD.transpose(0, 1) @ k_QND.transpose(1, 2) * scale
    if soft_cap is not None:
        scores_QLN = soft_cap * torch.tanh(scores_QLN / soft_cap)
    if allowed_LN is not None:
        scores_QLN = scores_QLN.masked_fill(~allowed_LN, -torch.inf)
    if sinks_Q is None:
        return (scores_QLN.softmax(-1) @ v_QND).transpose(0, 1)
    sinks_QL1 = sinks_Q.float()[:, None, None].expand(-1, len(q_LQD), 1)
    weights_QLN = torch.cat((scores_QLN, sinks_QL1), dim=-1).softmax(-1)[..., :-1]
    return (weights_QLN @ v_QND).transpose(0, 1)


def _within(row: PagedRow, first: int, window: int | None) -> torch.Tensor | None:
    """Which of the positions from `first` on each of a row's tokens sees; None for all."""
    if window is None:
        return row.allowed_LN
    length = row.context_len + row.end - row.start
    device = row.pages_P.device
    queries_L1 = torch.arange(row.context_len, length, device=device)[:, None]
    keys_1N = torch.arange(first, length, device=device)[None, :]
    allowed_LN = (keys_1N <= queries_L1) & (keys_1N > queries_L1 - window)
    return None if bool(allowed_LN.all()) and len(allowed_LN) == 1 else allowed_LN


def _as_they_are(k_PCHD: torch.Tensor, v_PCHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return k_PCHD, v_PCHD
