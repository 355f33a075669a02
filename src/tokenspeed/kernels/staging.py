"""Values of the host on their way to a device."""

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["send"]


def send(values_N: npt.NDArray[np.integer | np.floating], target_N: torch.Tensor) -> None:
    """Copy values to the device, of their type, without waiting for it.

    They go through pinned memory of their own, which PyTorch gives to nobody else before the copy
    is over: the caller may write the values of the next step meanwhile.

    Args:
        values_N: any numbers that the target's type holds.
        target_N: a contiguous tensor of as many.
    """
    pinned = target_N.device.type != "cpu"
    staged_N = torch.empty(len(values_N), dtype=target_N.dtype, pin_memory=pinned)
    staged_N.numpy()[:] = values_N
    target_N.copy_(staged_N, non_blocking=True)
