"""Weights in the native formats of the CPU kernels.

Legend: O outputs, I inputs.
"""

from collections.abc import Sequence

import torch

from tokenspeed._cpu import PackedMatrix
from tokenspeed._cpu import Runtime as CpuRuntime
from tokenspeed.core.errors import KernelError

__all__ = ["PackedWeight"]


class PackedWeight:
    """A matrix [O, I] whose outputs are parts stacked upon each other, each in its own format.

    A checkpoint may keep the parts that one product reads in different types (the Q4_K_M mixture
    of GGUF gives values more bits than queries), so each part is packed by itself. Quantised parts
    and dense ones do not mix.

    Args:
        shape: (O, I).
        parts: outputs of each part; they sum to O.
        dtype: element type of dense weights.
        runtime: gives the threads that pack, and the memory.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        parts: Sequence[int],
        dtype: torch.dtype,
        runtime: CpuRuntime,
    ) -> None:
        assert sum(parts) == shape[0]
        self.shape = shape
        self.dtype = dtype
        self._parts = tuple(parts)
        self._runtime = runtime
        self._packed: dict[int, PackedMatrix] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the parts packed so far."""
        return sum(matrix.size_bytes for matrix in self._packed.values())

    @property
    def matrices(self) -> list[PackedMatrix]:
        """The parts in order, for a kernel.

        Raises:
            KernelError: a part was never packed.
        """
        if len(self._packed) < len(self._parts):
            raise KernelError("a packed weight is used before all of its parts were loaded")
        return [self._packed[index] for index in range(len(self._parts))]

    def pack(self, part: int, quant_name: str, blocks: torch.Tensor) -> None:
        """Pack one part; a second time takes the place of the first.

        Args:
            part: which one.
            quant_name: ggml's name of the type of its blocks.
            blocks: uint8, contiguous: the part's rows one after the other.

        Raises:
            KernelError: no native format for the type, or blocks of another size.
        """
        self._packed[part] = PackedMatrix.pack(
            self._runtime, quant_name, blocks, outputs=self._parts[part], inputs=self.shape[1]
        )

    def pack_dense(self, part: int, values: torch.Tensor) -> None:
        """Pack one part in the weight's own element type; a second time replaces the first.

        Args:
            part: which one.
            values: its rows, of any element type.

        Raises:
            KernelError: the element type is neither float32 nor bfloat16.
        """
        assert values.shape == (self._parts[part], self.shape[1])
        self._packed[part] = PackedMatrix.pack_dense(
            self._runtime, values.to(self.dtype).contiguous()
        )
