"""Products with weights.

Legend: T tokens, I inputs, O outputs.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch

from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.placement import Partial, Replicate, Shard, boundary

__all__ = ["ColumnLinear", "Linear", "RowLinear"]


@boundary(x_TI=Replicate("tp"), out=Replicate("tp"))
class Linear(Module):
    """y = x W^T + b. Every rank holds the whole weight; subclasses divide it.

    Args:
        inputs: I.
        outputs: O.
        kernels: chooses the product.
        bias: whether b exists.
        parts: sizes of named products whose weights are stacked along O.
    """

    shard: ClassVar[Shard | None] = None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernels: KernelSelector,
        bias: bool = False,
        parts: Mapping[str, int] | None = None,
    ) -> None:
        format_name = kernels.weight_format(ops.gemm.linear)
        self.weight = Weight(
            (outputs, inputs),
            dims=("outputs", "inputs"),
            kernels=kernels,
            format_name=format_name,
            parts=parts,
            shard=self.shard,
        )
        self.bias: Weight | None = None
        if bias:
            divided = self.shard if self.shard and self.shard.dim == "outputs" else None
            self.bias = Weight(
                (outputs,), dims=("outputs",), kernels=kernels, parts=parts, shard=divided
            )
        self._linear = kernels.select(
            ops.gemm.linear, format_name=format_name, traits={"bias": bias}
        )

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """y_TO."""
        return self._linear(x_TI, self.weight.data, self.bias.tensor if self.bias else None)


@boundary(x_TI=Replicate("tp"), out=Shard("tp", "features"))
class ColumnLinear(Linear):
    """Each rank computes its share of the outputs."""

    shard = Shard("tp", "outputs")


@boundary(x_TI=Shard("tp", "features"), out=Partial("tp"))
class RowLinear(Linear):
    """Each rank sums over its share of the inputs."""

    shard = Shard("tp", "inputs")
