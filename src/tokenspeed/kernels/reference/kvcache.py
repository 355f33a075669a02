"""Writes to the KV cache.

Legend: T tokens, P pages, C positions of a page, H KV heads, D elements of a head.
"""

import torch

from tokenspeed.kernels.registry import ANY, Priority, kernel

__all__ = ["append"]


@kernel(
    "kvcache.append",
    solution="reference",
    formats=("float32", "bfloat16", "float16"),
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
        pool.view(-1, *pool.shape[2:]).index_copy_(0, kv_slots_T, x_THD.to(pool.dtype))
