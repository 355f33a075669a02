"""Attention of ranks that share a context: each over the positions it has, then put together.

Legend: T tokens, Q query heads, H KV heads, D elements of a head, L those of compressed KV, E those
of a latent, V those of a value that is made of compressed KV, X those of a mean and one more,
P pages, C positions of a page.
"""

import torch

from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.modeling.config import LatentConfig
from tokenspeed.modeling.head_weight import HeadWeight
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.placement import PartialSoftmax, PerPart, Shard, boundary

__all__ = ["ContextLatents", "ContextMerge", "ContextPart"]


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


@boundary(
    q_TQE=Shard("tp", "heads"),
    out=(Shard("tp", "heads"), PartialSoftmax("cp")),
)
class _LatentPart(Module):
    """Attention of all tokens over the latents of this rank's positions of their contexts.

    Args:
        latent_dim: E.
        value_dim: L.
        scale: what products of queries and latents are multiplied by.
        format_name: of KV pages.
        kernels: chooses the op.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        value_dim: int,
        scale: float,
        format_name: str,
        kernels: KernelSelector,
    ) -> None:
        self._scale = scale
        self._value_dim = value_dim
        self._attend = kernels.select(
            ops.attention.partial_mla,
            format_name=format_name,
            traits={"latent_dim": latent_dim, "value_dim": value_dim},
        )

    def forward(
        self, q_TQE: torch.Tensor, rows: PagedRows, latents_PCE: torch.Tensor
    ) -> torch.Tensor:
        """parts_TQX: means of compressed KV, and the logarithms of their sums."""
        return self._attend(q_TQE, latents_PCE, rows, self._scale, value_dim=self._value_dim)


@boundary(
    parts_TQX=(Shard("tp", "heads"), PerPart("cp")),
    out=(Shard("tp", "heads"), PerPart("cp")),
)
class _PartValues(Module):
    """Values of means of compressed KV: heads' up-projections, before parts are put together or
    behind, whichever moves less.

    Args:
        format_name: of the up-projections; the model's element type if None.
        kernels: chooses the op.
    """

    def __init__(self, format_name: str | None, *, kernels: KernelSelector) -> None:
        self._project = kernels.select(ops.attention.project_parts, format_name=format_name)

    def forward(self, parts_TQX: torch.Tensor, up: HeadWeight) -> torch.Tensor:
        """The same with means of V elements instead of L."""
        return self._project(parts_TQX, up.data)


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


class ContextLatents(Module):
    """Attention over latents of ranks that share a context.

    Args:
        config: sizes of latents.
        scale: what products of queries and latents are multiplied by.
        format_name: of KV pages.
        up_format_name: of heads' up-projections of V; the model's element type if None.
        kernels: chooses the ops.
    """

    def __init__(
        self,
        config: LatentConfig,
        *,
        scale: float,
        format_name: str,
        up_format_name: str | None,
        kernels: KernelSelector,
    ) -> None:
        self.part = _LatentPart(
            config.latent_dim,
            value_dim=config.kv_rank,
            scale=scale,
            format_name=format_name,
            kernels=kernels,
        )
        self.values = _PartValues(up_format_name, kernels=kernels)
        self.merge = ContextMerge(kernels)

    def forward(
        self, q_TQE: torch.Tensor, rows: PagedRows, latents_PCE: torch.Tensor, up: HeadWeight
    ) -> torch.Tensor:
        """out_TQV."""
        parts_TQX = self.values(self.part(q_TQE, rows, latents_PCE), up)
        out_TQV: torch.Tensor = self.merge(parts_TQX)
        return out_TQV
