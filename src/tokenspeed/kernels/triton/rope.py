"""Rotary positions.

Legend: T tokens, H heads, D elements of a head, E = D / 2.
"""

import torch

from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.registration import next_power_of_2, triton_kernel

__all__ = ["angles", "rotate"]

_device = DeviceCode("rope")
_HEADS = 4


@triton_kernel("rope.angles", formats=("float32",))
def angles(
    positions_T: torch.Tensor, frequencies_E: torch.Tensor, length: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A program for each token."""
    shape = (len(positions_T), len(frequencies_E))
    cos_TE, sin_TE = (
        torch.empty(shape, dtype=torch.float32, device=positions_T.device) for _ in range(2)
    )
    if cos_TE.numel():
        _device.angles[(shape[0],)](
            positions_T,
            frequencies_E,
            cos_TE,
            sin_TE,
            shape[1],
            BLOCK=next_power_of_2(shape[1]),
            num_warps=1,
        )
    if length != 1.0:
        cos_TE.mul_(length)
        sin_TE.mul_(length)
    return cos_TE, sin_TE


@triton_kernel("rope.rotate", traits={"head_dim": None})
def rotate(x_THD: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """A program for a few heads of each token."""
    tokens, heads, head_dim = x_THD.shape
    y_THD = x_THD.new_empty(x_THD.shape)
    if y_THD.numel():
        if x_THD.stride(-1) != 1:
            x_THD = x_THD.contiguous()
        _device.rotate[(tokens, -(-heads // _HEADS))](
            x_THD,
            cos_TE,
            sin_TE,
            y_THD,
            heads,
            head_dim // 2,
            x_THD.stride(0),
            x_THD.stride(1),
            HEADS=_HEADS,
            BLOCK=next_power_of_2(max(1, head_dim // 2)),
            num_warps=2,
        )
    return y_THD
