"""Attention over paged KV, one row after the other.

Legend: T tokens, L tokens of a row, N positions a row has in the cache, Q query heads, H KV
heads, G query heads of a KV head, D elements of a head, P pages, C positions of a page.
"""

import torch
import torch.nn.functional as F

from tokenspeed.kernels.registry import ANY, Priority, kernel
from tokenspeed.kernels.rows import PagedRows

__all__ = ["paged_mha"]


@kernel(
    "attention.paged_mha",
    solution="reference",
    formats=("float32", "bfloat16", "float16"),
    traits={"head_dim": ANY},
    priority=Priority.REFERENCE,
)
def paged_mha(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
) -> torch.Tensor:
    """Gather each row's pages, then attend in float32 with a mask that says who sees what.

    PyTorch's attention would take bfloat16 too, but rounds the probabilities to it, and on a
    CPU is no faster for that.
    """
    heads, head_dim = k_PCHD.shape[2:]
    group = q_TQD.shape[1] // heads
    out_TQD = torch.empty_like(q_TQD, memory_format=torch.contiguous_format)
    for row in rows.by_row:
        length = row.context_len + row.end - row.start
        k_HND = _gather(k_PCHD, row.pages_P, length)
        v_HND = _gather(v_PCHD, row.pages_P, length)
        q_LQD = q_TQD[row.start : row.end].float()
        if row.allowed_LN is None:
            # The query heads of a KV head stand where tokens would: K and V are read once.
            q_HGD = q_LQD.reshape(heads, group, head_dim)
            out_HGD = F.scaled_dot_product_attention(q_HGD[None], k_HND, v_HND, scale=scale)
            out_TQD[row.start] = out_HGD.reshape(-1, head_dim)
        else:
            out_1QLD = F.scaled_dot_product_attention(
                q_LQD.transpose(0, 1)[None],
                k_HND,
                v_HND,
                attn_mask=row.allowed_LN,
                scale=scale,
                enable_gqa=True,
            )
            out_TQD[row.start : row.end] = out_1QLD[0].transpose(0, 1)
    return out_TQD


def _gather(pool_PCHD: torch.Tensor, pages_P: torch.Tensor, length: int) -> torch.Tensor:
    found_NHD = pool_PCHD.index_select(0, pages_P).flatten(0, 1)[:length]
    return found_NHD.float().transpose(0, 1)[None]
