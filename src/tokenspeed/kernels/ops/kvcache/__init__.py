"""Owns the declarations of writes to the KV cache; never computes one.

Legend: T tokens, P pages, C positions of a page, H KV heads, D elements of a head.
"""

import torch

from tokenspeed.kernels.registry import declare_op

__all__ = ["append"]


@declare_op("kvcache.append", traits=("head_dim",))
def append(
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    kv_slots_T: torch.Tensor,
) -> None:
    """Write each token's K and V to slot page * C + offset of the pools, in place.

    kv_slots_T is int64 and has no value twice. Where in a page an element goes is a matter of the
    format, which attention over these pools must have too. Formats named after an element type
    keep the order of the dimensions.

    Traits:
        head_dim: D.
    """
    append.best(k_PCHD, head_dim=k_THD.shape[2])(k_THD, v_THD, k_PCHD, v_PCHD, kv_slots_T)
