"""The weights of all heads of a layer, each of which has a product of its own.

Legend: H heads, O outputs, I inputs.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from tokenspeed.kernels import PANELS, KernelSelector, PackedWeight, Stored, ops
from tokenspeed.kernels.ops.gemm import HeadMatrices
from tokenspeed.modeling.cut import Cut, Division
from tokenspeed.modeling.module import Weight

__all__ = ["HeadWeight"]


class HeadWeight(Weight):
    """Matrices [O, I] of H heads, which are some of the rows that a checkpoint has for each head.

    A checkpoint may keep what several products read in one matrix, the rows of a head next to each
    other; each of these products has a weight, and the tensor fills all of them.

    Args:
        heads: H.
        outputs: O.
        inputs: I.
        kernels: gives the element type and the format.
        rows: of a head, in the checkpoint.
        first: which of them is this weight's first.
        transposed: whether they are its inputs, and not its outputs.
    """

    def __init__(
        self,
        heads: int,
        outputs: int,
        inputs: int,
        *,
        kernels: KernelSelector,
        rows: int,
        first: int,
        transposed: bool = False,
    ) -> None:
        super().__init__(
            (heads, outputs, inputs),
            dims=("heads", "outputs", "inputs"),
            kernels=kernels,
            format_name=kernels.weight_format(ops.gemm.heads),
        )
        self._rows = rows
        self._taken = slice(first, first + (inputs if transposed else outputs))
        self._transposed = transposed

    @cached_property
    def data(self) -> Any:
        """What a kernel takes: `HeadMatrices` of this rank's heads."""
        made: HeadMatrices
        heads, outputs, inputs = self.local_shape
        if self.format_name in PANELS:
            made = tuple(
                PackedWeight(
                    (outputs, inputs),
                    parts=(outputs,),
                    dtype=self._kernels.dtype,
                    runtime=self._kernels.runtime,
                )
                for _ in range(heads)
            )
        else:
            made = torch.empty(self.local_shape, dtype=self._kernels.dtype, device=self._device)
        return made

    @property
    def size_bytes(self) -> int:
        """Bytes taken so far."""
        held = (self.data,) if isinstance(self.data, torch.Tensor) else self.data
        return sum(matrix.nbytes for matrix in held)

    def part_shape(self, name: str | None) -> tuple[int, ...]:
        """Sizes of the checkpoint's tensor."""
        heads, outputs, inputs = self.shape
        return (heads * self._rows, outputs if self._transposed else inputs)

    def place(self, divisions: Mapping[str, Division], *, absent: bool = False) -> None:
        """Become one rank's share: some of the heads, each whole."""
        assert not absent
        assert set(divisions) <= {"heads"}
        heads, outputs, inputs = self.shape
        if division := divisions.get("heads"):
            spans = Cut().spans(heads, division.shards, what="heads of a weight")
            first, end = spans[division.index]
            self.local_first = first
            self.local_shape = (end - first, outputs, inputs)

    def fill(self, name: str | None, stored: Stored) -> None:
        """Take this rank's heads, and of each the rows that are this weight's."""
        first = self.local_first or 0
        end = first + self.local_shape[0]
        value = stored[slice(first * self._rows, end * self._rows), slice(0, stored.shape[1])]
        values = value if isinstance(value, torch.Tensor) else value.to_float()
        values_HOI = values.reshape(end - first, self._rows, -1)[:, self._taken]
        if self._transposed:
            values_HOI = values_HOI.transpose(1, 2)
        for matrix, values_OI in zip(self.data, values_HOI, strict=True):
            if isinstance(matrix, PackedWeight):
                matrix.pack_dense(0, values_OI)
            else:
                matrix.copy_(values_OI)
