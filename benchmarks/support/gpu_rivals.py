"""Others' attention kernels on the operands of our workloads: those whose wheels are installed.

Each rival makes, of one call's operands, a call of its own that gives the same numbers. Interfaces
are those that the projects document; where a version has another one, the comparison fails by
itself and says so.

Legend: R rows, T tokens, Q query heads, H KV heads, D elements of a head, E elements of a latent,
V those that are its value, P pages, C positions of a page, I entries of a page list.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch

from tokenspeed.kernels.triton.workloads import Attended

__all__ = ["RIVALS", "Rival", "Uniform"]

_WORKSPACE_SIZE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Somebody's kernels.

    Attributes:
        module: what is imported.
        ops: names of the ops that it has.
        make: imports it, and makes a call on operands; gives out_TQD.
    """

    module: str
    ops: tuple[str, ...]
    make: Callable[[Attended], Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Uniform:
    """Rows as these kernels take them: all of one length, on the device.

    Attributes:
        of: the operands.
    """

    of: Attended

    @property
    def new(self) -> int:
        """Tokens of each row."""
        return int(self.of.rows.query_starts[1])

    @property
    def by_row(self) -> torch.Tensor:
        """Queries [R, L, Q, D]."""
        return self.of.q_TQD.view(-1, self.new, *self.of.q_TQD.shape[1:])

    @cached_property
    def page_table(self) -> torch.Tensor:
        """int32 [R, P], the pages of each row."""
        slots_R = torch.from_numpy(self.of.rows.row_slots).long()
        return self.of.rows.page_table_XP[slots_R.to(self.of.q_TQD.device)]

    @cached_property
    def lengths(self) -> torch.Tensor:
        """int32 [R], positions of each row once the step is done."""
        return self._ints(self.of.rows.context_lens + np.diff(self.of.rows.query_starts))

    @cached_property
    def query_starts(self) -> torch.Tensor:
        """int32 [R + 1], of tokens."""
        return self._ints(self.of.rows.query_starts)

    @cached_property
    def page_starts(self) -> torch.Tensor:
        """int32 [R + 1]: where a row's pages begin in `pages`."""
        rows, each = self.page_table.shape
        return self._ints(np.arange(0, (rows + 1) * each, each))

    @property
    def pages(self) -> torch.Tensor:
        """int32 [I], the pages of all rows one behind the other, each full but the last."""
        return self.page_table.reshape(-1)

    @property
    def last_pages(self) -> torch.Tensor:
        """int32 [R], positions of each row's last page."""
        return (self.lengths - 1) % self.of.rows.page_size + 1

    def _ints(self, values: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(self.of.q_TQD.device)


def _flashinfer(of: Attended) -> Callable[[], torch.Tensor]:
    import flashinfer  # noqa: PLC0415

    rows, q_TQD = Uniform(of), of.q_TQD
    workspace = torch.empty(_WORKSPACE_SIZE_BYTES, dtype=torch.uint8, device=q_TQD.device)
    heads, dim = q_TQD.shape[1:]
    kinds = {"q_data_type": q_TQD.dtype, "kv_data_type": of.pools[0].dtype}
    if of.value_dim is not None:
        wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace)
        sizes = (heads, of.value_dim, dim - of.value_dim, of.rows.page_size, True, of.scale)
        wrapper.plan(rows.query_starts, rows.page_starts, rows.pages, rows.lengths, *sizes, **kinds)
        (pool_PCE,) = of.pools
        parts = [part for whole in (q_TQD, pool_PCE) for part in _parted(whole, of.value_dim)]
        return lambda: wrapper.run(*parts)
    kv_heads = of.pools[0].shape[2]
    sizes = (heads, kv_heads, dim, of.rows.page_size)
    paged = (rows.page_starts, rows.pages, rows.last_pages)
    if rows.new == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True
        )
        wrapper.plan(*paged, *sizes, sm_scale=of.scale, **kinds)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(rows.query_starts, *paged, *sizes, causal=True, sm_scale=of.scale, **kinds)
    return lambda: wrapper.run(q_TQD, of.pools)


def _flash_mla(of: Attended) -> Callable[[], torch.Tensor]:
    import flash_mla  # noqa: PLC0415

    assert of.value_dim is not None
    rows, heads = Uniform(of), of.q_TQD.shape[1]
    schedule = flash_mla.get_mla_metadata(rows.lengths, rows.new * heads, 1)
    (pool_PCE,) = of.pools
    operands = (rows.by_row, pool_PCE.unsqueeze(2), rows.page_table, rows.lengths, of.value_dim)

    def run() -> torch.Tensor:
        out_RLQV, _ = flash_mla.flash_mla_with_kvcache(
            *operands, *schedule, softmax_scale=of.scale, causal=True
        )
        return out_RLQV.flatten(0, 1)

    return run


def _flash_attention_3(of: Attended) -> Callable[[], torch.Tensor]:
    import flash_attn_interface  # noqa: PLC0415

    rows = Uniform(of)
    operands = (rows.by_row, *of.pools)

    def run() -> torch.Tensor:
        found = flash_attn_interface.flash_attn_with_kvcache(
            *operands,
            cache_seqlens=rows.lengths,
            page_table=rows.page_table,
            softmax_scale=of.scale,
            causal=True,
        )
        return (found[0] if isinstance(found, tuple) else found).flatten(0, 1)

    return run


def _parted(x: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., :value_dim], x[..., value_dim:]


RIVALS: Final[Mapping[str, Rival]] = {
    "FlashInfer": Rival(
        module="flashinfer", ops=("attention.paged_mla", "attention.paged_mha"), make=_flashinfer
    ),
    "FlashMLA": Rival(module="flash_mla", ops=("attention.paged_mla",), make=_flash_mla),
    "FlashAttention-3": Rival(
        module="flash_attn_interface", ops=("attention.paged_mha",), make=_flash_attention_3
    ),
}
"""By name."""
