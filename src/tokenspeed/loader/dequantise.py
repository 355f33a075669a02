"""A tensor of a GGUF file as it lies there, and as float32."""

import mmap
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenspeed.core.errors import ConfigError, CorruptCheckpoint
from tokenspeed.kernels.dequantise import dequantise_blocks
from tokenspeed.loader.gguf_file import GGUFTensor, QuantType

__all__ = ["Blocks", "read_blocks"]

# A chunk's intermediate results stay in a core's own cache. And it is what PyTorch gives to one
# thread: larger ones wake its pool for some microseconds of work each, which on a machine with
# another busy process was seen to take fifty times as long.
CHUNK_ELEMENTS = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A tensor as it lies in the file; one of two dimensions is a `kernels.BlockMatrix`.

    Attributes:
        shape: elements by dimension, outermost first.
        quant: how they are stored.
        blocks: uint8 [all dimensions but the last, bytes of a row].
    """

    shape: tuple[int, ...]
    quant: QuantType
    blocks: Tensor

    @property
    def quant_name(self) -> str:
        """ggml's name of the type of the blocks."""
        return self.quant.name

    def __getitem__(self, index: tuple[slice, ...]) -> "Blocks":
        """Rows and inputs first:end of a matrix, as a view of the file.

        Raises:
            ConfigError: a block would be cut.
        """
        rows, inputs = index
        first, end, _ = inputs.indices(self.shape[1])
        if first % self.quant.block or end % self.quant.block:
            raise ConfigError(
                f"inputs {first}:{end} of a {self.quant.name} matrix of {self.shape[1]} cannot be "
                f"given to one rank: they are stored in blocks of {self.quant.block}. Choose "
                "another --tp, or another quantisation."
            )
        blocks = slice(
            first // self.quant.block * self.quant.block_size_bytes,
            end // self.quant.block * self.quant.block_size_bytes,
        )
        chosen = self.blocks[rows, blocks]
        shape = (len(chosen), end - first)
        return replace(self, shape=shape, blocks=chosen.contiguous())

    def with_rows(self, blocks: Tensor) -> "Blocks":
        """As many rows of the same type, of other blocks."""
        assert blocks.shape == self.blocks.shape
        return replace(self, blocks=blocks)

    def to_float(self) -> Tensor:
        """The elements: `shape`, float32."""
        raw_NB = self.blocks.view(-1, self.quant.block_size_bytes)
        out = torch.empty(len(raw_NB), self.quant.block)
        chunk_blocks = max(1, CHUNK_ELEMENTS // self.quant.block)
        for first in range(0, len(raw_NB), chunk_blocks):
            span = slice(first, first + chunk_blocks)
            out[span] = dequantise_blocks(raw_NB[span], self.quant.name)
        return out.view(self.shape)


def read_blocks(data: mmap.mmap, tensor: GGUFTensor) -> Blocks:
    """One tensor as it lies in the file, whose bytes are read when they are first used.

    So nothing is copied on the way to where weights are packed, and the threads that pack share the
    work of reading. A file that somebody cuts short after this call ends the process when the lost
    part is read, as it ends every process that maps files.

    Args:
        data: the GGUF file, mapped to be written (`mmap.ACCESS_COPY`), which torch wants; the
            tensor keeps it.
        tensor: which one.

    Raises:
        CorruptCheckpoint: the file ends early.
    """
    if tensor.offset + tensor.size_bytes > len(data):
        raise CorruptCheckpoint(f"the file ended within tensor {tensor.name!r}")
    rows = torch.frombuffer(
        data, dtype=torch.uint8, count=tensor.size_bytes, offset=tensor.offset
    ).view(*tensor.shape[:-1], -1)
    return Blocks(shape=tensor.shape, quant=tensor.quant, blocks=rows)
