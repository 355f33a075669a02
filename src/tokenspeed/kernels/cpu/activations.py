"""Activations as products with packed weights read them.

Legend: T tokens, I inputs.
"""

from dataclasses import dataclass

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.cpu.runtime import CpuRuntime

__all__ = ["QuantisedRows"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantisedRows:
    """Rows [T, I] of bytes with a float32 scale for each 32 of them, as an op wrote them for the
    products that read them. Only native kernels of the same runtime know how they lie, which is for
    the instruction set at hand (`csrc/cpu/kernels.h`).

    Attributes:
        shape: (T, I); I is a multiple of 32.
        dtype: the element type they stand for: what a product with them gives.
        memory: uint8, with room for T rows or fewer.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    memory: torch.Tensor

    @classmethod
    def empty(
        cls, tokens: int, inputs: int, *, dtype: torch.dtype, runtime: CpuRuntime
    ) -> "QuantisedRows":
        """Rows that a kernel is to write."""
        size_bytes = _cpu.quantised_size_bytes(runtime, tokens, inputs)
        return cls(
            shape=(tokens, inputs),
            dtype=dtype,
            memory=torch.empty(size_bytes, dtype=torch.uint8),
        )

    def __len__(self) -> int:
        return self.shape[0]
