"""Root-mean-square norms: of the residual stream, with the addition before it, and of heads.

Legend: T tokens, M model features, H heads, D elements of a head.
"""

from collections.abc import Sequence

import torch

from tokenspeed.kernels import Activations, KernelSelector, QuantisedRows, ops
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.placement import PerToken, Shard, boundary

__all__ = ["BranchNorm", "HeadNorm", "RMSNorm"]


@boundary(
    x_TM=PerToken("tp"),
    residual_TM=PerToken("tp"),
    outs=(PerToken("tp"), PerToken("tp")),
)
class RMSNorm(Module):
    """Adds x to the residual stream and normalises the sum (Zhang and Sennrich 2019).

    The stream is float32 whatever the model's type. It is by far the largest sum of the model, and
    in bfloat16 its rounding would make half of all the error of the logits.

    Args:
        features: M.
        epsilon: added to the mean square.
        kernels: chooses the norm.
        offset: added to the checkpoint's weight.
        reads: formats in which whoever reads the norm takes it beside tensors.
    """

    wide_inputs = frozenset({"x_TM"})

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        kernels: KernelSelector,
        offset: float = 0.0,
        reads: Sequence[str] = (),
    ) -> None:
        self.weight = Weight((features,), dims=("features",), kernels=kernels, offset=offset)
        self._epsilon = epsilon
        normed = kernels.result_format(ops.norm.rms_norm, ops.norm.add_rms_norm, reads=reads)
        self._rms_norm = kernels.select(ops.norm.rms_norm, format_name=normed)
        self._add_rms_norm = kernels.select(ops.norm.add_rms_norm, format_name=normed)

    def forward(
        self, x_TM: torch.Tensor, residual_TM: torch.Tensor | None
    ) -> tuple[Activations, torch.Tensor]:
        """(norm(x + residual), x + residual). Without a residual x, float32, begins the stream."""
        if residual_TM is None:
            return self._rms_norm(x_TM, self.weight.tensor, self._epsilon), x_TM
        return self._add_rms_norm(x_TM, residual_TM, self.weight.tensor, self._epsilon)


@boundary(x_THD=Shard("tp", "heads"), out=Shard("tp", "heads"))
class HeadNorm(Module):
    """Normalises each head by itself, all with one weight.

    Args:
        head_dim: D.
        epsilon: added to the mean square.
        kernels: chooses the norm.
        order: in which order a head's elements are kept; the checkpoint's if None.
        offset: added to the checkpoint's weight.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        epsilon: float,
        kernels: KernelSelector,
        order: Sequence[int] | None = None,
        offset: float = 0.0,
    ) -> None:
        self.weight = Weight(
            (head_dim,),
            dims=("features",),
            kernels=kernels,
            orders={None: order} if order else None,
            offset=offset,
        )
        self._epsilon = epsilon
        self._rms_norm = kernels.select(ops.norm.rms_norm)

    def forward(self, x_THD: torch.Tensor) -> torch.Tensor:
        """norm(x)."""
        normed_THD = self._rms_norm(x_THD, self.weight.tensor, self._epsilon)
        assert not isinstance(normed_THD, QuantisedRows)
        return normed_THD


@boundary(x_TM=PerToken("tp"), out=PerToken("tp"))
class BranchNorm(Module):
    """Normalises what a branch gives, before it is added to the residual stream.

    Args:
        features: M.
        epsilon: added to the mean square.
        kernels: chooses the norm.
        offset: added to the checkpoint's weight.
    """

    wide_inputs = frozenset({"x_TM"})

    def __init__(
        self, features: int, *, epsilon: float, kernels: KernelSelector, offset: float = 0.0
    ) -> None:
        self.weight = Weight((features,), dims=("features",), kernels=kernels, offset=offset)
        self._epsilon = epsilon
        self._rms_norm = kernels.select(ops.norm.rms_norm)

    def forward(self, x_TM: torch.Tensor) -> torch.Tensor:
        """norm(x)."""
        normed_TM = self._rms_norm(x_TM, self.weight.tensor, self._epsilon)
        assert not isinstance(normed_TM, QuantisedRows)
        return normed_TM
