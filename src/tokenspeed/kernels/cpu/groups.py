"""Matrices of quantised checkpoints in the native formats of the CPU kernels, where one of these
holds them exactly.

Four-bit numbers less what stands for zero, -16 to 15, times a float16 scale for each 32 inputs:
where 8 stands for zero everywhere that is ggml's Q4_0, else its Q5_0 with a fifth bit. Larger
groups repeat their scale. In Q4_1 products of scales and zeros would be rounded to float16.

Legend: O outputs, I inputs, G groups of inputs, N blocks of 32 inputs.
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from tokenspeed._cpu import PackedMatrix
from tokenspeed._cpu import Runtime as CpuRuntime
from tokenspeed.kernels.cpu.weights import PackedWeight
from tokenspeed.kernels.quantised import Int4Groups, QuantisedMatrix

__all__ = ["PackedGroups", "exact_blocks"]

_BLOCK = 32
# Native formats of weights as they are.
_DENSE = ("bf16", "f32")
_INT4_MIDDLE, _INT5_MIDDLE = 8, 16


def exact_blocks(matrix: QuantisedMatrix) -> tuple[str, torch.Tensor] | None:
    """ggml's name of a type of blocks that hold a matrix exactly, and its blocks, uint8 [O, bytes
    of a row]; None where none does.

    Args:
        matrix: not packed.
    """
    if not isinstance(matrix, Int4Groups) or matrix.group % _BLOCK:
        return None
    scales_OG = matrix.scales_OG.to(torch.float16)
    if not torch.equal(scales_OG.float(), matrix.scales_OG.float()):
        return None
    outputs, inputs = matrix.shape
    scales_ON = scales_OG.repeat_interleave(matrix.group // _BLOCK, 1)
    parts = [scales_ON.contiguous().view(torch.uint8).view(outputs, -1, 2)]
    zeros_OG = matrix.zeros_OG
    numbers_ONX = matrix.numbers.reshape(outputs, inputs // _BLOCK, _BLOCK)
    name = "Q4_0"
    if zeros_OG is not None and bool((zeros_OG != _INT4_MIDDLE).any()):
        name = "Q5_0"
        zeros_ON1 = zeros_OG.repeat_interleave(matrix.group // _BLOCK, 1)[..., None]
        numbers_ONX = numbers_ONX + _INT5_MIDDLE - zeros_ON1
        shifts = torch.arange(8, dtype=torch.uint8)
        fifths = (numbers_ONX >> 4).view(outputs, -1, 4, 8) << shifts
        parts.append(fifths.sum(-1, dtype=torch.uint8))
        numbers_ONX = numbers_ONX & 15
    half = _BLOCK // 2
    parts.append(numbers_ONX[..., :half] | numbers_ONX[..., half:] << 4)
    return name, torch.cat(parts, dim=-1).flatten(1)


class PackedGroups:
    """A matrix [O, I] whose outputs are parts stacked upon each other, each packed by itself, or
    dense where no native format holds it.

    Args:
        shape: (O, I).
        parts: outputs of each part; they sum to O.
        dtype: element type of dense parts.
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
        self.shape = shape
        self._weight = PackedWeight(shape, parts=parts, dtype=dtype, runtime=runtime)
        self._runs: list[tuple[slice, list[PackedMatrix]]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the parts packed so far."""
        return self._weight.nbytes

    @property
    def runs(self) -> list[tuple[slice, list[PackedMatrix]]]:
        """What one product each makes: outputs, and their parts, all quantised or all dense.

        Raises:
            KernelError: a part was never packed.
        """
        if self._runs is None:
            self._runs = _runs_of(self._weight.matrices)
        return self._runs

    def pack(self, part: int, matrix: QuantisedMatrix) -> None:
        """Pack one part; a second time takes the place of the first.

        Args:
            part: which one.
            matrix: not packed.
        """
        found = exact_blocks(matrix)
        if found is None:
            self.pack_dense(part, matrix.to_float())
            return
        self._runs = None
        self._weight.pack(part, *found)

    def pack_dense(self, part: int, values_OI: torch.Tensor) -> None:
        """Pack one part of values of any element type; a second time replaces the first."""
        self._runs = None
        self._weight.pack_dense(part, values_OI)


def _runs_of(matrices: Sequence[PackedMatrix]) -> list[tuple[slice, list[PackedMatrix]]]:
    runs = []
    first = 0
    for _, together in groupby(matrices, key=lambda matrix: matrix.format in _DENSE):
        run = list(together)
        end = first + sum(matrix.outputs for matrix in run)
        runs.append((slice(first, end), run))
        first = end
    return runs
