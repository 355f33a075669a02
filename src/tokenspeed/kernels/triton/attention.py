"""Attention over paged KV.

Legend: T tokens, Q query heads, H KV heads, D elements of a head, P pages, C positions of a page.
"""

import math

import torch

from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.paging import Geometry, Launch, schedules_of
from tokenspeed.kernels.triton.registration import KV_FORMATS, next_power_of_2, triton_kernel
from tokenspeed.kernels.triton.tuning import tuned

__all__ = [
    "FIXED_SPLIT",
    "attend",
    "dot_precision",
    "merge_pieces",
    "paged_mha",
    "paged_mha_fixed",
    "partial_results",
]

_device = DeviceCode("attention")
_LOG2_E = math.log2(math.e)
_OP = "attention.paged_mha"
_HEAD_DIM_MAX = 256
_MERGED_ELEMENTS = 4096
FIXED_SPLIT = 4096
"""Positions of a piece whose cuts do not depend on the batch."""


@triton_kernel(
    "attention.paged_mha",
    formats=KV_FORMATS,
    traits={"head_dim": range(1, _HEAD_DIM_MAX + 1)},
    batch_dependent=True,
)
def paged_mha(
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
    """Pieces of positions balanced over the multiprocessors, then merged."""
    geometry = _geometry(q_TQD, k_PCHD, window=window, split=None)
    return attend(
        q_TQD,
        k_PCHD,
        v_PCHD,
        rows,
        scale,
        sinks_Q=sinks_Q,
        soft_cap=soft_cap,
        geometry=geometry,
    )


@triton_kernel(
    "attention.paged_mha",
    formats=KV_FORMATS,
    traits={"head_dim": range(1, _HEAD_DIM_MAX + 1)},
)
def paged_mha_fixed(
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
    """The same in pieces of a fixed length and tiles of one height: a row's sums have one order,
    whatever shares its step and however its prompt was cut.
    """
    geometry = _geometry(q_TQD, k_PCHD, window=window, split=FIXED_SPLIT)
    return attend(
        q_TQD,
        k_PCHD,
        v_PCHD,
        rows,
        scale,
        sinks_Q=sinks_Q,
        soft_cap=soft_cap,
        geometry=geometry,
    )


def _geometry(
    q_TQD: torch.Tensor, k_PCHD: torch.Tensor, *, window: int | None, split: int | None
) -> Geometry:
    kv_heads = k_PCHD.shape[2]
    head_dim, dtype = q_TQD.shape[2], q_TQD.dtype
    wide = head_dim > 128 or dtype == torch.float32
    sizes = tuned(_OP, f"{head_dim}, {dtype}", q_TQD.device, block=32 if wide else 64)
    return Geometry(
        group=q_TQD.shape[1] // kv_heads,
        blocks=kv_heads,
        rows_max=64 if wide or split else 128,
        short_rows_max=64,
        block=sizes["block"],
        window=window,
        split=split,
    )


def attend(
    q_TQD: torch.Tensor,
    k_PCHD: torch.Tensor,
    v_PCHD: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    sinks_Q: torch.Tensor | None,
    soft_cap: float | None,
    geometry: Geometry,
) -> torch.Tensor:
    """out_TQD, by tiles of some geometry."""
    head_dim = q_TQD.shape[2]
    kv_heads = geometry.blocks
    if q_TQD.stride(-1) != 1:
        q_TQD = q_TQD.contiguous()
    out_TQD = q_TQD.new_empty(q_TQD.shape)
    block_dim = max(16, next_power_of_2(head_dim))
    for launch in schedules_of(rows, geometry):
        means, lses = partial_results(launch, kv_heads, block_dim, q_TQD.device)
        sizes = tuned(
            _OP,
            f"{launch.rows} rows of {head_dim}, {q_TQD.dtype}",
            q_TQD.device,
            warps=8 if launch.rows >= 128 else 4,
            stages=2 if q_TQD.dtype == torch.float32 else 3,
        )
        _device.attend[(launch.programs, kv_heads)](
            q_TQD,
            k_PCHD,
            v_PCHD,
            rows.page_table_XP,
            launch.starts,
            launch.items,
            sinks_Q,
            out_TQD,
            means,
            lses,
            q_TQD.stride(0),
            q_TQD.stride(1),
            kv_heads,
            rows.page_table_XP.stride(0),
            scale * _LOG2_E,
            (soft_cap or 0.0) * _LOG2_E,
            GROUP=geometry.group,
            HEAD_DIM=head_dim,
            PAGE=rows.page_size,
            WINDOW=geometry.window or 0,
            HAS_SINKS=sinks_Q is not None,
            CAPPED=soft_cap is not None,
            M=launch.rows,
            N=geometry.block,
            D=block_dim,
            PRECISION=dot_precision(q_TQD.dtype),
            num_warps=sizes["warps"],
            num_stages=sizes["stages"],
        )
        merge_pieces(launch, means, lses, out_TQD, sinks_Q, geometry=geometry)
    return out_TQD


def partial_results(
    launch: Launch, blocks: int, block_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for means and logarithms of sums of pieces, float32."""
    count = launch.partial_count * blocks * launch.rows
    means = torch.empty((count, block_dim), dtype=torch.float32, device=device)
    return means, torch.empty(count, dtype=torch.float32, device=device)


def merge_pieces(
    launch: Launch,
    means: torch.Tensor,
    lses: torch.Tensor,
    out_TQD: torch.Tensor,
    sinks_Q: torch.Tensor | None,
    *,
    geometry: Geometry,
) -> None:
    """Put tiles of several pieces together."""
    if not launch.merge_count:
        return
    block_dim = means.shape[1]
    at_once = max(1, min(launch.rows, _MERGED_ELEMENTS // block_dim))
    _device.merge[(launch.merge_count, geometry.blocks, launch.rows // at_once)](
        launch.merges,
        means,
        lses,
        sinks_Q,
        out_TQD,
        geometry.blocks,
        out_TQD.shape[1],
        GROUP=geometry.group,
        HEAD_DIM=out_TQD.shape[2],
        HAS_SINKS=sinks_Q is not None,
        M=launch.rows,
        D=block_dim,
        ROWS=at_once,
        num_warps=4,
    )


def dot_precision(dtype: torch.dtype) -> str:
    """How products of a type are taken: float32 as it is, not rounded to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"
