"""What stands between logits and tokens.

Legend: S rows, V vocabulary, K likeliest tokens, L tokens seen, N tokens with a bias, W 32-bit
words of V bits.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.registry import Priority, kernel

__all__ = ["add_bias", "apply_bitmask", "argmax", "draw", "logprobs", "penalise"]


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


@kernel(
    "sampling.logprobs",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=("float32",),
    priority=Priority.NATIVE,
)
def logprobs(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, count: int, *, runtime: CpuRuntime
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pass for the greatest, one for the sum of weights; the likeliest by blocks of 64 tokens."""
    rows = len(logits_SV)
    chosen_S = torch.empty(rows, dtype=torch.float32)
    ids_SK = torch.empty((rows, count), dtype=torch.int64)
    values_SK = torch.empty((rows, count), dtype=torch.float32)
    _cpu.logprobs(runtime, logits_SV, tokens_S, count, chosen_S, ids_SK, values_SK)
    return chosen_S, ids_SK, values_SK


@kernel(
    "sampling.penalise",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=("float32",),
    priority=Priority.NATIVE,
)
def penalise(
    logits_V: torch.Tensor,
    seen_L: torch.Tensor,
    output_counts_L: torch.Tensor,
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    """Reads and writes the logits of the tokens seen, and no other."""
    _cpu.penalise(logits_V, seen_L, output_counts_L, repetition, presence, frequency)


@kernel(
    "sampling.add_bias",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=("float32",),
    priority=Priority.NATIVE,
)
def add_bias(logits_V: torch.Tensor, ids_N: torch.Tensor, values_N: torch.Tensor) -> None:
    """Reads and writes the logits that have a bias, and no other."""
    _cpu.add_bias(logits_V, ids_N, values_N)


@kernel(
    "sampling.apply_bitmask",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=("float32",),
    priority=Priority.NATIVE,
)
def apply_bitmask(
    logits_SV: torch.Tensor, bitmask_SW: torch.Tensor, *, runtime: CpuRuntime
) -> None:
    """16 logits at a time, each with its bit as a lane's mask."""
    _cpu.apply_bitmask(runtime, logits_SV, bitmask_SW)
