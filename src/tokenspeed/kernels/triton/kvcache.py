"""Writes to the KV cache.

Legend: T tokens, P pages, C positions of a page, Q query heads, H KV heads, D elements of a head,
E elements of a latent, or pairs of a head.
"""

import torch

from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.registration import KV_FORMATS, next_power_of_2, triton_kernel

__all__ = ["append", "append_latents", "rotate_and_append"]

_device = DeviceCode("rows")
_rope = DeviceCode("rope")
_BLOCK_MAX = 1024
_HEADS = 4


@triton_kernel("kvcache.append", formats=KV_FORMATS, traits={"head_dim": None})
def append(
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    kv_slots_T: torch.Tensor,
    *,
    k_offset_HD: torch.Tensor | None = None,
) -> None:
    """Both copies in one launch; pools are contiguous."""
    _append(k_THD, v_THD, k_PCHD, v_PCHD, kv_slots_T)


@triton_kernel("kvcache.append_latents", formats=KV_FORMATS, traits={"latent_dim": None})
def append_latents(
    latents_TE: torch.Tensor, latents_PCE: torch.Tensor, kv_slots_T: torch.Tensor
) -> None:
    """A copy of each row, in the pool's type; the pool is contiguous."""
    _append(latents_TE[:, None], None, latents_PCE[:, :, None], None, kv_slots_T)


@triton_kernel("kvcache.rotate_and_append", formats=KV_FORMATS, traits={"head_dim": None})
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
    """One launch, of a program for a few heads of each token; pools are contiguous."""
    tokens, heads, head_dim = q_TQD.shape
    out_TQD = q_TQD.new_empty(q_TQD.shape)
    if not out_TQD.numel():
        return out_TQD
    q_TQD, k_THD, v_THD = (
        x_TXD if x_TXD.stride(-1) == 1 else x_TXD.contiguous() for x_TXD in (q_TQD, k_THD, v_THD)
    )
    kv_heads = k_THD.shape[1]
    saturates = k_PCHD.dtype.itemsize == 1
    _rope.rotate_and_append[(tokens, -(-heads // _HEADS) + -(-kv_heads // _HEADS))](
        q_TQD,
        k_THD,
        v_THD,
        cos_TE,
        sin_TE,
        out_TQD,
        k_PCHD,
        v_PCHD,
        kv_slots_T,
        heads,
        kv_heads,
        head_dim // 2,
        q_TQD.stride(0),
        q_TQD.stride(1),
        k_THD.stride(0),
        k_THD.stride(1),
        v_THD.stride(0),
        v_THD.stride(1),
        torch.finfo(k_PCHD.dtype).max if saturates else 0.0,
        SATURATES=saturates,
        HEADS=_HEADS,
        BLOCK=next_power_of_2(max(1, head_dim // 2)),
        num_warps=2,
    )
    return out_TQD


def _append(
    k_THD: torch.Tensor,
    v_THD: torch.Tensor | None,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor | None,
    kv_slots_T: torch.Tensor,
) -> None:
    tokens, heads, head_dim = k_THD.shape
    width = heads * head_dim
    if not tokens:
        return
    k_THD = k_THD if k_THD.stride(-1) == 1 else k_THD.contiguous()
    v_like_THD = k_THD if v_THD is None else v_THD
    if v_like_THD.stride(-1) != 1:
        v_like_THD = v_like_THD.contiguous()
    saturates = k_PCHD.dtype.itemsize == 1
    block = min(_BLOCK_MAX, next_power_of_2(width))
    _device.append[(tokens, -(-width // block))](
        k_THD,
        v_like_THD,
        k_PCHD,
        v_PCHD,
        kv_slots_T,
        width,
        head_dim,
        k_THD.stride(0),
        k_THD.stride(1),
        v_like_THD.stride(0),
        v_like_THD.stride(1),
        torch.finfo(k_PCHD.dtype).max if saturates else 0.0,
        SATURATES=saturates,
        BOTH=v_THD is not None,
        BLOCK=block,
        num_warps=4,
    )
