"""Attention over paged latents.

Legend: T tokens, Q query heads, E elements of a latent, V those of them that are its value, P
pages, C positions of a page.
"""

import math

import torch

from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.triton.attention import (
    FIXED_SPLIT,
    dot_precision,
    merge_pieces,
    partial_results,
)
from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.paging import Geometry, schedules_of
from tokenspeed.kernels.triton.registration import KV_FORMATS, next_power_of_2, triton_kernel
from tokenspeed.kernels.triton.tuning import tuned

__all__ = ["attend_latents", "heads_of_a_tile", "paged_mla", "paged_mla_fixed"]

_device = DeviceCode("latent")
_OP = "attention.paged_mla"
_LOG2_E = math.log2(math.e)
# Rows of a tile: what one product of the matrix unit takes, with a mean of 512 elements in
# registers.
_TILE_ROWS = 64
_TRAITS = {"latent_dim": range(2, 641), "value_dim": range(1, 513)}


@triton_kernel(
    "attention.paged_mla",
    formats=KV_FORMATS,
    traits=_TRAITS,
    batch_dependent=True,
)
def paged_mla(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    value_dim: int,
) -> torch.Tensor:
    """Tokens and heads fold into tiles; pieces are balanced over the multiprocessors."""
    geometry = _geometry(q_TQE, split=None)
    return attend_latents(q_TQE, latents_PCE, rows, scale, value_dim=value_dim, geometry=geometry)


@triton_kernel("attention.paged_mla", formats=KV_FORMATS, traits=_TRAITS)
def paged_mla_fixed(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    value_dim: int,
) -> torch.Tensor:
    """The same in pieces of a fixed length and tiles of one height, as `paged_mha_fixed` is."""
    geometry = _geometry(q_TQE, split=FIXED_SPLIT)
    return attend_latents(q_TQE, latents_PCE, rows, scale, value_dim=value_dim, geometry=geometry)


def _geometry(q_TQE: torch.Tensor, *, split: int | None) -> Geometry:
    group, blocks = heads_of_a_tile(q_TQE.shape[1])
    latent_dim, dtype = q_TQE.shape[2], q_TQE.dtype
    block = 16 if dtype == torch.float32 else 32
    sizes = tuned(_OP, f"{latent_dim}, {dtype}", q_TQE.device, block=block)
    return Geometry(
        group=group,
        blocks=blocks,
        rows_max=_TILE_ROWS,
        short_rows_max=_TILE_ROWS,
        block=sizes["block"],
        window=None,
        split=split,
    )


def heads_of_a_tile(heads: int) -> tuple[int, int]:
    """Heads that share a tile, and how many such blocks there are.

    The largest number that divides the heads, or a full tile of them where that would leave more
    than half of it empty.
    """
    if heads <= _TILE_ROWS:
        return heads, 1
    even = max(count for count in range(1, _TILE_ROWS + 1) if heads % count == 0)
    group = even if 2 * even > _TILE_ROWS else _TILE_ROWS
    return group, -(-heads // group)


def attend_latents(
    q_TQE: torch.Tensor,
    latents_PCE: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    value_dim: int,
    geometry: Geometry,
) -> torch.Tensor:
    """out_TQV, by tiles of some geometry."""
    tokens, heads, latent_dim = q_TQE.shape
    if q_TQE.stride(-1) != 1:
        q_TQE = q_TQE.contiguous()
    out_TQV = q_TQE.new_empty((tokens, heads, value_dim))
    block_dim = max(16, next_power_of_2(value_dim))
    for launch in schedules_of(rows, geometry):
        means, lses = partial_results(launch, geometry.blocks, block_dim, q_TQE.device)
        sizes = tuned(
            _OP,
            f"{launch.rows} rows of {latent_dim}, {q_TQE.dtype}",
            q_TQE.device,
            warps=8 if launch.rows >= 64 else 4,
            stages=2,
        )
        _device.attend_latents[(launch.programs, geometry.blocks)](
            q_TQE,
            latents_PCE,
            rows.page_table_XP,
            launch.starts,
            launch.items,
            out_TQV,
            means,
            lses,
            q_TQE.stride(0),
            q_TQE.stride(1),
            geometry.blocks,
            heads,
            rows.page_table_XP.stride(0),
            scale * _LOG2_E,
            GROUP=geometry.group,
            LATENT_DIM=latent_dim,
            VALUE_DIM=value_dim,
            PAGE=rows.page_size,
            M=launch.rows,
            N=geometry.block,
            V=block_dim,
            R=max(16, next_power_of_2(latent_dim - value_dim)),
            PRECISION=dot_precision(q_TQE.dtype),
            num_warps=sizes["warps"],
            num_stages=sizes["stages"],
        )
        merge_pieces(launch, means, lses, out_TQV, None, geometry=geometry)
    return out_TQV
