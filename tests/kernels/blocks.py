"""Random blocks of ggml's types, and what they mean.

Legend: O outputs, I inputs.
"""

import torch

from tokenspeed.loader.dequantise import dequantise_blocks
from tokenspeed.loader.gguf_file import QUANT_TYPES

QUANTS = {quant.name: quant for quant in QUANT_TYPES.values() if quant.block > 1}

# Where a block has float16 numbers.
_HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(quant_name: str, outputs: int, inputs: int, *, seed: int = 0) -> torch.Tensor:
    """uint8 [O, bytes of a row]: every bit random, but for scales and minima of either sign."""
    quant = QUANTS[quant_name]
    generator = torch.Generator().manual_seed(seed)
    count = outputs * inputs // quant.block
    raw = torch.randint(
        0, 256, (count, quant.block_size_bytes), dtype=torch.uint8, generator=generator
    )
    for start in _HALVES[quant_name]:
        halves = torch.randn(count, generator=generator).mul_(0.01).half()
        raw[:, start : start + 2] = halves.view(torch.uint8).view(count, 2)
    return raw.view(outputs, -1)


def dequantised(raw: torch.Tensor, quant_name: str) -> torch.Tensor:
    """float32 [O, I]."""
    blocks = raw.view(-1, QUANTS[quant_name].block_size_bytes)
    return dequantise_blocks(blocks, quant_name).view(len(raw), -1)
