"""The likeliest token, and a draw.

Legend: S rows, V vocabulary.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.registry import Priority, kernel

__all__ = ["argmax", "draw"]


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


@kernel(
    "sampling.draw",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=("float32",),
    priority=Priority.NATIVE,
)
def draw(
    logits_SV: torch.Tensor,
    uniforms_S: torch.Tensor,
    *,
    temperatures_S: torch.Tensor,
    top_ks_S: torch.Tensor,
    top_ps_S: torch.Tensor,
    min_ps_S: torch.Tensor,
    runtime: CpuRuntime,
) -> torch.Tensor:
    """Nothing but the tokens around a bound is sorted; sums are float64 in the order of ids."""
    tokens_S = torch.empty(len(logits_SV), dtype=torch.int64)
    _cpu.draw(
        runtime,
        logits_SV,
        uniforms_S,
        temperatures_S,
        top_ks_S,
        top_ps_S,
        min_ps_S,
        tokens_S,
    )
    return tokens_S
