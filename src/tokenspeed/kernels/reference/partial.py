"""Attention over a rank's share of each context, one row after the other.

Legend: T tokens, L tokens of a row, N positions of a row that are here and that some token of it
sees, Q query heads, H KV heads, D elements of a head, X of a part of an attention, P pages,
C positions of a page.
"""

from collections.abc import Callable
from typing import Final

import torch

from tokenspeed.kernels.kv_formats import FLOAT8, ROUNDED
from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.reference.rounded import HEAD_DIMS, read_rounded
from tokenspeed.kernels.registry import ANY, Priority, kernel
from tokenspeed.kernels.rows import PagedRows

__all__ = ["partial_mha", "partial_mha_rounded"]

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
        q_TQD, k_PCHD, v_PCHD, rows, scale, read=_as_they_are, window=window, sinks_Q=sinks_Q
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
        q_TQD, k_PCHD, v_PCHD, rows, scale, read=read_rounded, window=window, sinks_Q=sinks_Q
    )


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
) -> torch.Tensor:
    tokens, heads, head_dim = q_TQD.shape
    group = heads // k_PCHD.shape[2]
    parts_TQX = q_TQD.new_empty((tokens, heads, head_dim + 1), dtype=torch.float32)
    seen_T2 = torch.from_numpy(rows.seen(window)).to(q_TQD.device)
    starts = rows.query_starts.tolist()
    for start, end, slot in zip(starts, starts[1:], rows.row_slots.tolist(), strict=False):
        first, last = int(seen_T2[start, 0]), int(seen_T2[end - 1, 1])
        # Pages behind the window of the row's first token may be anybody's by now.
        hidden = first // rows.page_size
        pages_P = rows.page_table_XP[slot, hidden : -(-last // rows.page_size)]
        first = hidden * rows.page_size
        k_QND, v_QND = (
            found_PCHD.flatten(0, 1)[: max(0, last - first)]
            .float()
            .transpose(0, 1)
            .repeat_interleave(group, dim=0)
            for found_PCHD in read(k_PCHD[pages_P], v_PCHD[pages_P])
        )
        keys_1N = torch.arange(first, max(first, last), device=q_TQD.device)[None, :]
        from_L1, to_L1 = seen_T2[start:end].unsqueeze(-1).unbind(1)
        hidden_LN = (keys_1N < from_L1) | (keys_1N >= to_L1)
        scores_QLN = q_TQD[start:end].float().transpose(0, 1) @ k_QND.transpose(1, 2) * scale
        scores_QLN = scores_QLN.masked_fill(hidden_LN, -torch.inf)
        # What nobody sees may be no number, and 0 times that is none either.
        v_QND = v_QND.masked_fill(hidden_LN.all(0)[:, None], 0.0)
        sums_QL1 = scores_QLN.logsumexp(-1, keepdim=True)
        if sinks_Q is not None and rows.has_sinks:
            sums_QL1 = torch.logaddexp(sums_QL1, sinks_Q.float()[:, None, None])
        weights_QLN = (scores_QLN - sums_QL1).exp().masked_fill(hidden_LN, 0.0)
        parts_TQX[start:end, :, :-1] = (weights_QLN @ v_QND).transpose(0, 1)
        parts_TQX[start:end, :, -1:] = sums_QL1.transpose(0, 1)
    return parts_TQX
