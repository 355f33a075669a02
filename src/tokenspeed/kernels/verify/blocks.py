"""Random blocks of ggml's types, and weights packed from them.

Legend: O outputs, I inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.dequantise import dequantise_blocks
from tokenspeed.kernels.weights import PackedWeight

__all__ = [
    "BLOCK_TYPES",
    "BlockType",
    "dequantised",
    "identity_weight",
    "packed_weight",
    "random_blocks",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """How a block lies in memory.

    Attributes:
        inputs: elements of a block.
        size_bytes: of a block.
        halves: bytes of a block at which a float16 scale or minimum begins.
    """

    inputs: int
    size_bytes: int
    halves: tuple[int, ...]


BLOCK_TYPES: Final[Mapping[str, BlockType]] = {
    "Q4_0": BlockType(inputs=32, size_bytes=18, halves=(0,)),
    "Q4_1": BlockType(inputs=32, size_bytes=20, halves=(0, 2)),
    "Q4_K": BlockType(inputs=256, size_bytes=144, halves=(0, 2)),
    "Q5_0": BlockType(inputs=32, size_bytes=22, halves=(0,)),
    "Q5_1": BlockType(inputs=32, size_bytes=24, halves=(0, 2)),
    "Q5_K": BlockType(inputs=256, size_bytes=176, halves=(0, 2)),
    "Q6_K": BlockType(inputs=256, size_bytes=210, halves=(208,)),
    "Q8_0": BlockType(inputs=32, size_bytes=34, halves=(0,)),
}
"""By ggml's name, those that have a native format."""


def random_blocks(quant_name: str, outputs: int, inputs: int, *, seed: int = 0) -> torch.Tensor:
    """uint8 [O, bytes of a row]: every bit random, but for scales and minima of either sign."""
    kind = BLOCK_TYPES[quant_name]
    generator = torch.Generator().manual_seed(seed)
    count = outputs * inputs // kind.inputs
    raw = torch.randint(0, 256, (count, kind.size_bytes), dtype=torch.uint8, generator=generator)
    for start in kind.halves:
        halves = torch.randn(count, generator=generator).mul_(0.01).half()
        raw[:, start : start + 2] = halves.view(torch.uint8).view(count, 2)
    return raw.view(outputs, -1)


def dequantised(raw: torch.Tensor, quant_name: str) -> torch.Tensor:
    """float32 [O, I], what blocks mean."""
    blocks = raw.view(-1, BLOCK_TYPES[quant_name].size_bytes)
    return dequantise_blocks(blocks, quant_name).view(len(raw), -1)


def packed_weight(
    parts: Sequence[tuple[str, int]], inputs: int, *, dtype: torch.dtype, runtime: CpuRuntime
) -> tuple[PackedWeight, torch.Tensor]:
    """A weight of random blocks, and its values as float32 [O, I].

    Args:
        parts: ggml's type and the outputs of each part.
        inputs: I.
        dtype: element type of looked-up rows.
        runtime: packs.
    """
    counts = [outputs for _, outputs in parts]
    weight = PackedWeight((sum(counts), inputs), parts=counts, dtype=dtype, runtime=runtime)
    values = []
    for index, (quant_name, outputs) in enumerate(parts):
        raw = random_blocks(quant_name, outputs, inputs, seed=index)
        weight.pack(index, quant_name, raw)
        values.append(dequantised(raw, quant_name))
    return weight, torch.cat(values)


def identity_weight(inputs: int, *, runtime: CpuRuntime) -> PackedWeight:
    """The identity [I, I]: a product with it gives the very rows that it reads, in float32."""
    blocks = torch.zeros(inputs, inputs // 32, BLOCK_TYPES["Q8_0"].size_bytes, dtype=torch.uint8)
    blocks[..., :2] = torch.ones(1, dtype=torch.float16).view(torch.uint8)
    rows = torch.arange(inputs)
    blocks[rows, rows // 32, 2 + rows % 32] = 1
    weight = PackedWeight((inputs, inputs), parts=(inputs,), dtype=torch.float32, runtime=runtime)
    weight.pack(0, "Q8_0", blocks)
    return weight
