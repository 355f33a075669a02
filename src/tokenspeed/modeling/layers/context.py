"""Attention of ranks that share a context: each over the positions it has, then put together.

Legend: T tokens, Q query heads, H KV heads, D elements of a head, X = D + 1, P pages, C positions
of a page.
"""

import torch

from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.placement import PartialSoftmax, Shard, boundary

__all__ = ["ContextMerge", "ContextPart"]


@boundary(
    q_TQD=Shard("tp", "heads"),
    out=(Shard("tp", "heads"), PartialSoftmax("cp")),
)
class ContextPart(Module):
    """Attention of all tokens over this rank's positions of their contexts.

    Args:
        head_dim: D.
        scale: what products of queries and keys are multiplied by.
        window: tokens that a query sees, itself included; all if None.
        format_name: of KV pages.
        kernels: chooses the op.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        scale: float,
        window: int | None,
        format_name: str,
        kernels: KernelSelector,
    ) -> None:
        self._scale = scale
        self._window = window
        self._attend = kernels.select(
            ops.attention.partial_mha, format_name=format_name, traits={"head_dim": head_dim}
        )

    def forward(
        self,
        q_TQD: torch.Tensor,
        rows: PagedRows,
        kv: tuple[torch.Tensor, torch.Tensor],
        sinks: Weight | None,
    ) -> torch.Tensor:
        """parts_TQX: means over kv = (k_PCHD, v_PCHD), and the logarithms of their sums."""
        return self._attend(
            q_TQD,
            *kv,
            rows,
            self._scale,
            window=self._window,
            sinks_Q=sinks.tensor if sinks else None,
        )


@boundary(parts_TQX=Shard("tp", "heads"), out=Shard("tp", "heads"))
class ContextMerge(Module):
    """What is left of parts once they are merged: the means.

    Args:
        kernels: gives the element type.
    """

    def __init__(self, kernels: KernelSelector) -> None:
        self._dtype = kernels.dtype

    def forward(self, parts_TQX: torch.Tensor) -> torch.Tensor:
        """out_TQD."""
        return parts_TQX[..., :-1].to(self._dtype)
