"""Static input buffers: memory that every forward reads its inputs from.

Legend: N entries, X slots, P pages of a slot, D changes.
"""

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.core.step import GroupPlan

__all__ = ["InputBuffer", "PageTable"]


class InputBuffer:
    """int64 values of a step at an address that stays.

    Args:
        size: most values of a step.
        device: where the forward reads them.
    """

    def __init__(self, size: int, *, device: torch.device) -> None:
        self._on_device_N = torch.zeros(size, dtype=torch.int64, device=device)
        self._staged_N, self._host_N = _stage(self._on_device_N)

    def fill(self, values_N: npt.NDArray[np.integer]) -> torch.Tensor:
        """Take values in; gives int64 [N] on the device, valid until the next fill."""
        count = len(values_N)
        self._host_N[:count] = values_N
        if self._staged_N is not self._on_device_N:
            self._on_device_N[:count].copy_(self._staged_N[:count], non_blocking=True)
        return self._on_device_N[:count]


class PageTable:
    """Which page holds which positions of each slot, in one cache group.

    Args:
        slots_max: X.
        pages_max: P, pages of the longest request.
        device: where attention reads it.

    Attributes:
        pages_XP: int32 on the device.
    """

    def __init__(self, *, slots_max: int, pages_max: int, device: torch.device) -> None:
        self.pages_XP = torch.zeros((slots_max, pages_max), dtype=torch.int32, device=device)
        self._staged_XP, self._host_XP = _stage(self.pages_XP)

    def apply(self, plan: GroupPlan) -> None:
        """Make a plan's changes, in their order."""
        # Of several values for one entry numpy keeps the last.
        self._host_XP[plan.table_slots, plan.table_indices] = plan.table_pages
        if self._staged_XP is not self.pages_XP and len(plan.table_slots):
            for slot in np.unique(plan.table_slots).tolist():
                self.pages_XP[slot].copy_(self._staged_XP[slot], non_blocking=True)

    def kv_slots(
        self, slot: int, first: int, count: int, *, page_size: int
    ) -> npt.NDArray[np.integer]:
        """Where K and V of `count` positions of a slot lie, from position `first` on: as
        `GroupPlan.kv_slots`."""
        positions = np.arange(first, first + count)
        found: npt.NDArray[np.integer] = (
            self._host_XP[slot, positions // page_size] * page_size + positions % page_size
        )
        return found


def _stage(on_device: torch.Tensor) -> tuple[torch.Tensor, npt.NDArray[np.integer]]:
    """Host memory to write a buffer through: itself on a CPU, pinned memory for a GPU."""
    staged = on_device
    if on_device.device.type != "cpu":
        staged = torch.zeros(on_device.shape, dtype=on_device.dtype, pin_memory=True)
    return staged, staged.numpy()
