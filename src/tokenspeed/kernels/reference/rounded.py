"""KV pages of whole numbers (`interleaved_int8`): their layout, rounding, and the ops over them.

Of each position and KV head K and V are whole numbers in [-127, 127] times a float32 scale. K is
rounded after a Hadamard transform H of the largest power of two that divides the head, unscaled,
which spreads the elements that stand out over all (Ashkboos et al. 2024, QuaRot), and after taking
off what K of all positions have in common, which softmax does not notice.

A pool is int8 [P, C, H, D + 4]. The bytes of a page are those of one head after the other: of K
[D / 4, C, 4] unsigned, 128 more than what they stand for, of V [C / 2, D, 2]; then scales [C].

Legend: T tokens, P pages, C positions of a page, H KV heads, D elements of a head, N positions.
"""

import torch

from tokenspeed.kernels.reference.attention import attend
from tokenspeed.kernels.registry import Priority, kernel
from tokenspeed.kernels.rows import PagedRows

__all__ = ["append_rounded", "paged_mha_rounded", "read_rounded"]

_FORMATS = ("interleaved_int8",)
# What vectors of native kernels hold; pages are laid out for them.
HEAD_DIMS = range(16, 257, 16)
_SCALE_SIZE_BYTES = 4
_EXCESS = 128
_LARGEST = 127
# Of less, the inverse of the scale would be infinite.
_LEAST = 1e-30


@kernel(
    "kvcache.append",
    solution="reference",
    formats=_FORMATS,
    traits={"head_dim": HEAD_DIMS},
    priority=Priority.REFERENCE,
)
def append_rounded(
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    kv_slots_T: torch.Tensor,
    *,
    k_offset_HD: torch.Tensor | None = None,
) -> None:
    """Round in float32, then scatter bytes and scales."""
    wide_THD = k_THD.float()
    if k_offset_HD is not None:
        wide_THD = wide_THD - k_offset_HD.float()
    page_size = k_PCHD.shape[1]
    pages_T, at_T = kv_slots_T // page_size, kv_slots_T % page_size
    k_PHWCE, k_scales_PHC = _views(k_PCHD, values=False)
    whole_THD, scales_TH = _round(_hadamard(wide_THD))
    unsigned_THD = (whole_THD + _EXCESS).to(torch.uint8).view(torch.int8)
    k_PHWCE[pages_T, :, :, at_T] = unsigned_THD.view(*k_THD.shape[:2], -1, 4)
    k_scales_PHC[pages_T, :, at_T] = scales_TH
    v_PHWDE, v_scales_PHC = _views(v_PCHD, values=True)
    whole_THD, scales_TH = _round(v_THD.float())
    v_PHWDE[pages_T, :, at_T // 2, :, at_T % 2] = whole_THD.to(torch.int8)
    v_scales_PHC[pages_T, :, at_T] = scales_TH


@kernel(
    "attention.paged_mha",
    solution="reference",
    formats=_FORMATS,
    traits={"head_dim": HEAD_DIMS},
    priority=Priority.REFERENCE,
    batch_dependent=True,
)
def paged_mha_rounded(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    window: int | None = None,
    sinks_Q: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Undo rounding and transform of each row's pages, then attend in float32."""
    return attend(
        q_TQD,
        k_PCHD,
        v_PCHD,
        rows,
        scale,
        read=read_rounded,
        window=window,
        sinks_Q=sinks_Q,
        soft_cap=soft_cap,
    )


def read_rounded(k_PCHD: torch.Tensor, v_PCHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 K and V of some pages in the plain order, [P, C, H, D] without scales."""
    k_PHWCE, k_scales_PHC = _views(k_PCHD, values=False)
    k_PHCD = k_PHWCE.view(torch.uint8).permute(0, 1, 3, 2, 4).flatten(3).float() - _EXCESS
    k_PHCD = _hadamard(k_PHCD * k_scales_PHC[..., None]) / _size(k_PHCD.shape[-1])
    v_PHWDE, v_scales_PHC = _views(v_PCHD, values=True)
    v_PHCD = v_PHWDE.transpose(3, 4).flatten(2, 3).float() * v_scales_PHC[..., None]
    return k_PHCD.transpose(1, 2), v_PHCD.transpose(1, 2)


def _views(pool_PCHD: torch.Tensor, *, values: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes as words of 4 elements of K, or of 2 positions of V; and scales_PHC."""
    pages, page_size, heads, size_bytes = pool_PCHD.shape
    head_dim = size_bytes - _SCALE_SIZE_BYTES
    bytes_PHX = pool_PCHD.view(pages, heads, page_size * size_bytes)
    whole_PHX = bytes_PHX[:, :, : page_size * head_dim]
    scales_PHC = bytes_PHX[:, :, page_size * head_dim :].view(torch.float32)
    if values:
        return whole_PHX.view(pages, heads, page_size // 2, head_dim, 2), scales_PHC
    return whole_PHX.view(pages, heads, head_dim // 4, page_size, 4), scales_PHC


def _round(x_THD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers, still as floats, and scales_TH."""
    most_TH = x_THD.abs().amax(-1)
    small_TH = most_TH < _LEAST
    # A number over a tensor would be a product with the inverse, which rounds twice.
    inverse_TH = torch.full_like(most_TH, _LARGEST).div(most_TH).masked_fill(small_TH, 0.0)
    scales_TH = (most_TH * (1 / _LARGEST)).masked_fill(small_TH, 0.0)
    return torch.round(x_THD * inverse_TH[..., None]), scales_TH


def _size(dim: int) -> int:
    return dim & -dim


def _hadamard(x_XD: torch.Tensor) -> torch.Tensor:
    """H x of the last dimension, by sums and differences of elements ever farther apart."""
    size = x_XD.shape[-1]
    apart = 1
    while apart < _size(size):
        pairs_XB2A = x_XD.reshape(*x_XD.shape[:-1], size // (2 * apart), 2, apart)
        first, second = pairs_XB2A.unbind(-2)
        x_XD = torch.stack((first + second, first - second), -2).flatten(-3)
        apart *= 2
    return x_XD
