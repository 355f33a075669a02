"""Rotary positions; a token's result is the same bits in any batch.

Legend: T tokens, H heads, D elements of a head, E = D / 2.
"""

import torch

from tokenspeed import _cpu
from tokenspeed.kernels.capability import Capability
from tokenspeed.kernels.cpu.runtime import CpuRuntime
from tokenspeed.kernels.registry import ANY, Priority, kernel

__all__ = ["angles", "rotate"]

_CPU = Capability(device="cpu")


@kernel(
    "rope.angles", solution="cpu", requires=_CPU, formats=("float32",), priority=Priority.NATIVE
)
def angles(
    positions_T: torch.Tensor,
    frequencies_E: torch.Tensor,
    length: float = 1.0,
    *,
    runtime: CpuRuntime,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The C library's sine and cosine of the float32 angle, in double precision, rounded once."""
    shape = (len(positions_T), len(frequencies_E))
    cos_TE, sin_TE = torch.empty(shape), torch.empty(shape)
    _cpu.angles(runtime, positions_T, frequencies_E, length, cos_TE, sin_TE)
    return cos_TE, sin_TE


@kernel(
    "rope.rotate",
    solution="cpu",
    requires=_CPU,
    formats=("float32", "bfloat16"),
    traits={"head_dim": ANY},
    priority=Priority.NATIVE,
)
def rotate(
    x_THD: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor, *, runtime: CpuRuntime
) -> torch.Tensor:
    """One pass in float32, rounded once."""
    y_THD = x_THD.new_empty(x_THD.shape)
    if x_THD.stride(1) == x_THD.shape[2]:
        _cpu.rotate(runtime, x_THD, cos_TE, sin_TE, y_THD)
        return y_THD
    # Parts of wider heads, as queries on latents have them, are no heads behind each other.
    for head in range(x_THD.shape[1]):
        one = slice(head, head + 1)
        _cpu.rotate(runtime, x_THD[:, one], cos_TE, sin_TE, y_THD[:, one])
    return y_THD
