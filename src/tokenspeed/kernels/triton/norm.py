"""Root-mean-square norms.

Legend: T tokens, M model features.
"""

import torch

from tokenspeed.kernels.triton.lazy import DeviceCode
from tokenspeed.kernels.triton.registration import next_power_of_2, triton_kernel

__all__ = ["add_rms_norm", "rms_norm"]

_device = DeviceCode("norm")
# Elements of a row that one warp holds.
_ELEMENTS_A_WARP = 512


@triton_kernel("norm.rms_norm")
def rms_norm(x_TM: torch.Tensor, weight_M: torch.Tensor, epsilon: float) -> torch.Tensor:
    """A program for each row, of heads where x has them."""
    y_TM = torch.empty(x_TM.shape, dtype=weight_M.dtype, device=x_TM.device)
    _launch(x_TM, None, weight_M, epsilon, y_TM=y_TM, sum_TM=None)
    return y_TM


@triton_kernel("norm.add_rms_norm")
def add_rms_norm(
    x_TM: torch.Tensor, residual_TM: torch.Tensor, weight_M: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, float32, is written on the way."""
    sum_TM = torch.empty(x_TM.shape, dtype=torch.float32, device=x_TM.device)
    y_TM = torch.empty(x_TM.shape, dtype=weight_M.dtype, device=x_TM.device)
    _launch(x_TM, residual_TM.contiguous(), weight_M, epsilon, y_TM=y_TM, sum_TM=sum_TM)
    return y_TM, sum_TM


def _launch(
    x_TM: torch.Tensor,
    residual_TM: torch.Tensor | None,
    weight_M: torch.Tensor,
    epsilon: float,
    *,
    y_TM: torch.Tensor,
    sum_TM: torch.Tensor | None,
) -> None:
    rows = y_TM.numel() // y_TM.shape[-1]
    if not rows:
        return
    if x_TM.stride(-1) != 1:
        x_TM = x_TM.contiguous()
    block = next_power_of_2(x_TM.shape[-1])
    _device.rms_norm[(rows,)](
        x_TM,
        residual_TM,
        weight_M,
        y_TM,
        sum_TM,
        x_TM.shape[1] if x_TM.dim() == 3 else 1,
        x_TM.shape[-1],
        x_TM.stride(0),
        x_TM.stride(1) if x_TM.dim() == 3 else 0,
        epsilon,
        ADDS=residual_TM is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // _ELEMENTS_A_WARP)),
    )
