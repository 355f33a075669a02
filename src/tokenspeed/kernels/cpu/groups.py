"""Matrices of quantised checkpoints in the native formats of the CPU kernels, where one of these
holds them exactly.

Four-bit numbers less what stands for zero, -16 to 15, times a float16 scale for each 32 inputs:
where 8 stands for zero everywhere that is ggml's Q4_0, else its Q5_0 with a fifth bit. Larger
groups repeat their scale. In Q4_1 products of scales and zeros would be rounded to float16.
The numbers of MXFP4, doubled, are whole ones from -12 to 12: Q5_0, too, with half their scale.

Legend: O outputs, I inputs, G groups of inputs, N blocks of 32 inputs.
"""

from collections.abc import Sequence
from itertools import groupby

import torch

from tokenspeed._cpu import PackedMatrix
from tokenspeed._cpu import Runtime as CpuRuntime
from tokenspeed.kernels.cpu.weights import PackedWeight
from tokenspeed.kernels.quantised import (
    FLOAT4_GROUP,
    FLOAT4_VALUES,
    Float4Groups,
    Int4Groups,
    QuantisedMatrix,
)

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
    if isinstance(matrix, Float4Groups):
        return _blocks_of_float4(matrix)
    if isinstance(matrix, Int4Groups):
        return _blocks_of_int4(matrix)
    return None


def _blocks_of_int4(matrix: Int4Groups) -> tuple[str, torch.Tensor] | None:
    if matrix.group % _BLOCK or not _are_halves(matrix.scales_OG):
        return None
    scales_ON = matrix.scales_OG.half().repeat_interleave(matrix.group // _BLOCK, 1)
    zeros_OG = matrix.zeros_OG
    if zeros_OG is None or not bool((zeros_OG != _INT4_MIDDLE).any()):
        return "Q4_0", _blocks(scales_ON, matrix.numbers, five_bits=False)
    zeros_OI = zeros_OG.repeat_interleave(matrix.group, 1)
    return "Q5_0", _blocks(scales_ON, matrix.numbers + _INT5_MIDDLE - zeros_OI, five_bits=True)


def _blocks_of_float4(matrix: Float4Groups) -> tuple[str, torch.Tensor] | None:
    doubled = (torch.tensor(FLOAT4_VALUES) * 2 + _INT5_MIDDLE).to(torch.uint8)
    # Ten times as fast as indexing by a tensor.
    numbers_OI = doubled.index_select(0, matrix.numbers.flatten().int()).view(matrix.shape)
    exact_OG = torch.ldexp(torch.ones(matrix.powers_OG.shape), matrix.exponents() - 1)
    if not _are_halves(exact_OG):
        # A group of zeros may have any scale, and packers give it the least.
        zero_OG = (numbers_OI == _INT5_MIDDLE).view(*exact_OG.shape, FLOAT4_GROUP).all(-1)
        exact_OG = exact_OG.masked_fill(zero_OG, 0.0)
        if not _are_halves(exact_OG):
            return None
    return "Q5_0", _blocks(exact_OG.half(), numbers_OI, five_bits=True)


def _are_halves(scales: torch.Tensor) -> bool:
    return torch.equal(scales.half().float(), scales.float())


def _blocks(scales_ON: torch.Tensor, numbers_OI: torch.Tensor, *, five_bits: bool) -> torch.Tensor:
    """ggml's blocks of float16 scales and of numbers of four bits or five."""
    outputs = len(scales_ON)
    numbers_ONX = numbers_OI.reshape(outputs, -1, _BLOCK)
    parts = [scales_ON.contiguous().view(torch.uint8).view(outputs, -1, 2)]
    if five_bits:
        shifts = torch.arange(8, dtype=torch.uint8)
        fifths = (numbers_ONX >> 4).view(outputs, -1, 4, 8) << shifts
        parts.append(fifths.sum(-1, dtype=torch.uint8))
        numbers_ONX = numbers_ONX & 15
    half = _BLOCK // 2
    parts.append(numbers_ONX[..., :half] | numbers_ONX[..., half:] << 4)
    return torch.cat(parts, dim=-1).flatten(1)


class PackedGroups:
    """A matrix [O, I] whose outputs are parts stacked upon each other, each packed by itself, or
    dense where no native format holds it.

    Args:
        shape: (O, I).
        parts: outputs of each part; they sum to O.
        dtype: element type of dense parts.
        runtime: gives the threads that pack, and the memory.

    Attributes:
        dequantised: numbers of parts that were quantised and are dense now.
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
        self.dequantised: set[int] = set()
        self._weight = PackedWeight(shape, parts=parts, dtype=dtype, runtime=runtime)
        self._runs: list[tuple[slice, list[PackedMatrix]]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the parts packed so far."""
        return self._weight.nbytes

    @property
    def matrices(self) -> list[PackedMatrix]:
        """The parts in order, quantised ones and dense ones, for a kernel that takes both.

        Raises:
            KernelError: a part was never packed.
        """
        return self._weight.matrices

    @property
    def runs(self) -> list[tuple[slice, list[PackedMatrix]]]:
        """What one product each makes: outputs, and their parts, all quantised or all dense.

        Raises:
            KernelError: a part was never packed.
        """
        if self._runs is None:
            self._runs = _runs_of(self.matrices)
        return self._runs

    def pack(self, part: int, matrix: QuantisedMatrix) -> None:
        """Pack one part; a second time takes the place of the first.

        Args:
            part: which one.
            matrix: not packed.
        """
        self.dequantised.discard(part)
        found = exact_blocks(matrix)
        if found is None:
            self.pack_dense(part, matrix.to_float())
            self.dequantised.add(part)
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
