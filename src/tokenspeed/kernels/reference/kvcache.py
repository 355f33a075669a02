"""Writes to the KV cache.

Legend: T tokens, P pages, C positions of a page, H KV heads, D elements of a head.
"""

import torch

from tokenspeed.kernels.kv_formats import FLOAT8
from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.registry import ANY, Priority, kernel

__all__ = ["append", "scatter"]


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
