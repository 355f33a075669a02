"""Rows of a batch.

Legend: T tokens, S sampled tokens, M model features.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.registry import Priority, kernel

__all__ = ["take"]


@kernel(
    "embedding.take",
    solution="cpu",
    requires=Capability(device="cpu"),
    formats=("float32", "bfloat16"),
    priority=Priority.NATIVE,
)
def take(x_TM: torch.Tensor, indices_S: torch.Tensor, *, runtime: CpuRuntime) -> torch.Tensor:
    """A copy for each row."""
    x_SM = x_TM.new_empty((len(indices_S), x_TM.shape[1]))
    _cpu.take(runtime, x_TM, indices_S, x_SM)
    return x_SM
