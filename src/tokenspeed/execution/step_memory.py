"""Memory for the tensors of a recorded step, laid out by when each of them is needed.

A recording runs in the order in which it was made, so a tensor can lie where another did that no
later kernel reads, whoever still holds it in Python. Between which kernels each is needed is known
once a forward has been through; it is the same each time, so a second one is given places that were
chosen knowing all of that.
"""

import bisect
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tokenspeed.kernels.cpu import prefer_huge_pages

__all__ = ["PlannedMemory", "StepMemory", "TrialMemory"]

# Tensors begin where lines of any cache do.
_ALIGNMENT_BYTES = 64


class StepMemory(Protocol):
    """Where the tensors of a forward get memory."""

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor."""

    def use(self, address: int) -> None:
        """A kernel reads or writes a tensor, or a part of one, that lies there."""


@dataclass(slots=True, kw_only=True)
class _Need:
    """Memory of a tensor and its views, when it was made and when it was last used."""

    room_bytes: int
    begin: int
    end: float


class TrialMemory:
    """Gives each tensor memory of its own, not to be written, and notes how long it is used."""

    def __init__(self) -> None:
        self._needs: list[_Need] = []
        self._events = 0
        # Of tensors that are held: what they need, and where they begin, ascending.
        self._held: dict[int, _Need] = {}
        self._addresses: list[int] = []

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As `StepMemory`."""
        now = self._next()
        need = _Need(room_bytes=_room_bytes(shape, dtype), begin=now, end=now)
        self._needs.append(need)
        # The tensor and its views hold on to this array, and nothing else does.
        held = np.empty(need.room_bytes, dtype=np.uint8)
        address = held.ctypes.data
        self._held[address] = need
        bisect.insort(self._addresses, address)
        weakref.finalize(held, self._drop, address).atexit = False
        return _tensor(torch.from_numpy(held), shape, dtype)

    def use(self, address: int) -> None:
        """As `StepMemory`; what lies elsewhere is not this memory's."""
        index = bisect.bisect_right(self._addresses, address) - 1
        if index < 0:
            return
        need = self._held[self._addresses[index]]
        if address < self._addresses[index] + need.room_bytes:
            need.end = self._next()

    def planned(self) -> "PlannedMemory":
        """Memory for the same tensors once more, of which those that are held now stay for good.

        The largest are placed first, each at the lowest place that nothing else needs while it is
        used (greedy by size: Pisarchyk and Lee 2020, "Efficient Memory Management for Deep Neural
        Net Inference").
        """
        for need in self._held.values():
            need.end = math.inf
        starts = [0] * len(self._needs)
        placed: list[tuple[int, _Need]] = []
        for index in sorted(range(len(starts)), key=lambda at: -self._needs[at].room_bytes):
            need = self._needs[index]
            beside = [
                (start, start + other.room_bytes)
                for start, other in placed
                if other.begin < need.end and need.begin < other.end
            ]
            for start, end in sorted(beside):
                if starts[index] + need.room_bytes <= start:
                    break
                starts[index] = max(starts[index], end)
            placed.append((starts[index], need))
        return PlannedMemory(
            [(start, need.room_bytes) for start, need in zip(starts, self._needs, strict=True)]
        )

    def _next(self) -> int:
        self._events += 1
        return self._events

    def _drop(self, address: int) -> None:
        del self._held[address]
        self._addresses.remove(address)


class PlannedMemory:
    """One block, in which the tensors of a forward lie where they were planned to.

    Args:
        places: of each tensor in the order in which they are asked for, first byte and bytes.

    Attributes:
        size_bytes: of the block; what of it is never written takes no memory.
    """

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        self.size_bytes = max((start + room for start, room in places), default=0)
        self._places = iter(places)
        self._block = torch.empty(self.size_bytes, dtype=torch.uint8)
        prefer_huge_pages(self._block)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As `StepMemory`."""
        start, room_bytes = next(self._places)
        assert room_bytes == _room_bytes(shape, dtype), "a forward asks for the same each time"
        return _tensor(self._block[start : start + room_bytes], shape, dtype)

    def use(self, address: int) -> None:
        """As `StepMemory`; the places are chosen already."""


def _room_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    size_bytes = max(1, math.prod(shape) * dtype.itemsize)
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _tensor(memory: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)
