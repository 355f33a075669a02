"""Owns the declarations of writes to the KV cache; never computes one.

Legend: T tokens, P pages, C positions of a page, Q query heads, H KV heads, D elements of a head,
E elements of a latent.
"""

import torch

from tokenspeed.kernels.kv_formats import pool_format
from tokenspeed.kernels.registry import declare_op

__all__ = ["append", "append_latents", "rotate_and_append"]


@declare_op("kvcache.append", traits=("head_dim",))
def append(
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    kv_slots_T: torch.Tensor,
    *,
    k_offset_HD: torch.Tensor | None = None,
) -> None:
    """Write each token's K and V to slot page * C + offset of the pools, in place.

    kv_slots_T is int64 and has no value twice. Where in a page an element goes is a matter of the
    format, which attention over these pools must have too. Formats named after an element type
    keep the order of the dimensions; `interleaved_int8` rounds, and has four more bytes for each
    head of a position, so that its pools are [P, C, H, D + 4].

    k_offset_HD is what K of all positions have in common, as far as it is known. Formats that
    round take it off first, which moves all scores of a query by one number: softmax is the same,
    and less is lost. It must be the same for all that a pool ever holds, and None where scores are
    capped or heads have sinks. Other formats do not look at it.

    Traits:
        head_dim: D.
    """
    kernel = append.best(k_PCHD, format_name=pool_format(k_PCHD), head_dim=k_THD.shape[2])
    kernel(k_THD, v_THD, k_PCHD, v_PCHD, kv_slots_T, k_offset_HD=k_offset_HD)


@declare_op("kvcache.append_latents", traits=("latent_dim",))
def append_latents(
    latents_TE: torch.Tensor, latents_PCE: torch.Tensor, kv_slots_T: torch.Tensor
) -> None:
    """Write each token's latent to slot page * C + offset of the pool, in place.

    A latent is what `attention.paged_mla` says: compressed KV, and behind it the rotated key.
    kv_slots_T is int64 and has no value twice.

    Traits:
        latent_dim: E.
    """
    kernel = append_latents.best(latents_PCE, latent_dim=latents_TE.shape[1])
    kernel(latents_TE, latents_PCE, kv_slots_T)


@declare_op("kvcache.rotate_and_append", traits=("head_dim",))
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
    """q_TQD rotated, as `rope.rotate` rotates it; K is rotated too, and written with V as `append`
    writes them, bits and all.

    A model calls it where a kernel does better than these two ops, and them elsewhere. Its format
    is that of the pages.

    Traits:
        head_dim: D = 2 E.
    """
    kernel = rotate_and_append.best(
        k_PCHD, format_name=pool_format(k_PCHD), head_dim=k_THD.shape[2]
    )
    pages = {"k_PCHD": k_PCHD, "v_PCHD": v_PCHD, "kv_slots_T": kv_slots_T}
    return kernel(q_TQD, k_THD, v_THD, cos_TE, sin_TE, **pages)
