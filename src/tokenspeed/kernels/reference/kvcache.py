"""Writes to the KV cache.

Legend: T tokens, P pages, C positions of a page, Q query heads, H KV heads, D elements of a head,
E = D / 2.
"""

import torch

from tokenspeed.kernels.kv_formats import FLOAT8
from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.reference.rope import rotate
from tokenspeed.kernels.registry import ANY, Priority, kernel

__all__ = ["append", "rotate_and_append", "scatter"]


@kernel(
    "kvcache.append",
    solution="reference",
    formats=(*DENSE, FLOAT8),
    traits={"head_dim": ANY},
    priority=Priority.REFERENCE,
)
def append(
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    kv_slots_T: torch.Tensor,
    *,
    k_offset_HD: torch.Tensor | None = None,
) -> None:
    """A scatter into the pools seen as one long row of slots, which may be of another type."""
    for pool, x_THD in ((k_PCHD, k_THD), (v_PCHD, v_THD)):
        scatter(x_THD, pool, kv_slots_T)


@kernel(
    "kvcache.rotate_and_append",
    solution="reference",
    formats=(*DENSE, FLOAT8),
    traits={"head_dim": ANY},
    priority=Priority.REFERENCE,
)
def rotate_and_append(
    q_TQD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    *,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    kv_slots_T: torch.Tensor,
) -> torch.Tensor:
    """One op after the other."""
    append(rotate(k_THD, cos_TE, sin_TE), v_THD, k_PCHD, v_PCHD, kv_slots_T)
    return rotate(q_TQD, cos_TE, sin_TE)


def scatter(x_TX: torch.Tensor, pool_PCX: torch.Tensor, kv_slots_T: torch.Tensor) -> None:
    """Write rows to slots, in the pool's type; one of 8 bits takes its greatest number for more."""
    slots = pool_PCX.view(-1, *pool_PCX.shape[2:])
    if pool_PCX.dtype.itemsize > 1:
        slots.index_copy_(0, kv_slots_T, x_TX.to(pool_PCX.dtype))
        return
    most = torch.finfo(pool_PCX.dtype).max
    rounded = x_TX.float().clamp(-most, most).to(pool_PCX.dtype)
    # PyTorch copies such numbers by index only as what they are made of.
    slots.view(torch.uint8).index_copy_(0, kv_slots_T, rounded.view(torch.uint8))
