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
) -> None:
    """A scatter into the pools seen as one long row of slots."""
    k_PCHD.view(-1, *k_PCHD.shape[2:]).index_copy_(0, kv_slots_T, k_THD)
    v_PCHD.view(-1, *v_PCHD.shape[2:]).index_copy_(0, kv_slots_T, v_THD)
