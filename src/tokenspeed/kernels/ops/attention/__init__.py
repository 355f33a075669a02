"""Owns the declarations of attention over paged KV; never computes it.

Legend: T tokens, Q query heads, H KV heads, D elements of a head, P pages, C positions of a page.
"""

import torch

from tokenspeed.kernels.kv_formats import pool_format
from tokenspeed.kernels.registry import declare_op
from tokenspeed.kernels.rows import PagedRows

__all__ = ["paged_mha"]


@declare_op("attention.paged_mha", traits=("head_dim",))
def paged_mha(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v for every row of a mixed batch; gives out_TQD.

    The KV of the step's own tokens is in the pages already. A token at position p of its row
    attends to positions 0..p of it, or to the last `window` of these; what pages that no token of
    the row sees hold does not matter. Query head i reads KV head i * H // Q (grouped-query
    attention, Ainslie et al. 2023). Softmax and sums are float32. A row's result does not
    depend on the other rows.

    Traits:
        head_dim: D.
    """
    kernel = paged_mha.best(q_TQD, format_name=pool_format(k_PCHD), head_dim=q_TQD.shape[2])
    return kernel(q_TQD, k_PCHD, v_PCHD, rows, scale, window=window)
