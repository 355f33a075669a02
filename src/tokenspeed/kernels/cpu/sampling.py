"""The likeliest token.

Legend: S rows, V vocabulary.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.registry import Priority, kernel

__all__ = ["argmax"]


@kernel(
    "sampling.argmax",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=("float32",),
    priority=Priority.NATIVE,
)
def argmax(logits_SV: torch.Tensor, *, runtime: CpuRuntime) -> torch.Tensor:
    """One pass over the vocabulary, and one over the block that has the greatest."""
    tokens_S = torch.empty(len(logits_SV), dtype=torch.int64)
    _cpu.argmax(runtime, logits_SV, tokens_S)
    return tokens_S
