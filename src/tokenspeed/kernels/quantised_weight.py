"""Quantised matrices in a device's memory, as one product or one kernel of experts reads them.

Legend: O outputs, I inputs.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tokenspeed.core.errors import KernelError
from tokenspeed.kernels.quantised import (
    Float4Groups,
    Float8Blocks,
    Int4Groups,
    QuantisedMatrix,
)

__all__ = ["QuantisedWeight"]


class QuantisedWeight:
    """A matrix [O, I] in a device's memory, whose outputs are parts stacked upon each other.

    Checkpoints leave some matrices as they were, and some have groups that no kernel reads: such
    parts are dense. Neighbours of one kind become one, so that one launch serves them.

    Args:
        shape: (O, I).
        format_name: one of `QUANTISED`.
        parts: outputs of each part; they sum to O.
        dtype: element type of dense parts.
        device: where they lie.
        uniform: whether parts of several kinds become one that is dense, for kernels that read all
            of them at once.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        format_name: str,
        parts: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        uniform: bool = False,
    ) -> None:
        assert sum(parts) == shape[0]
        self.shape = shape
        self.format_name = format_name
        self._parts = tuple(parts)
        self._dtype = dtype
        self._device = device
        self._uniform = uniform
        self._loaded: dict[int, QuantisedMatrix | torch.Tensor] = {}
        self._matrices: tuple[QuantisedMatrix | torch.Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the parts loaded so far."""
        held = self._matrices or tuple(self._loaded.values())
        return sum(matrix.nbytes for matrix in held)

    @property
    def matrices(self) -> tuple[QuantisedMatrix | torch.Tensor, ...]:
        """What outputs are made with, from the first on, for a kernel.

        Raises:
            KernelError: a part was never loaded.
        """
        if not self._matrices:
            raise KernelError("a quantised weight is used before all of its parts were loaded")
        return self._matrices

    def pack(self, part: int, matrix: QuantisedMatrix) -> None:
        """Load one part as it is, or dense where no kernel reads its groups.

        Args:
            part: which one.
            matrix: not packed.
        """
        if matrix.step is None:
            self.pack_dense(part, matrix.to_float())
            return
        assert matrix.shape == (self._parts[part], self.shape[1])
        self._take(part, matrix.packed().to(self._device))

    def pack_dense(self, part: int, values_OI: torch.Tensor) -> None:
        """Load one part of values of any element type."""
        assert values_OI.shape == (self._parts[part], self.shape[1])
        self._take(part, values_OI.to(device=self._device, dtype=self._dtype))

    def to(self, device: torch.device) -> "QuantisedWeight":
        """A copy elsewhere."""
        copy = QuantisedWeight(
            self.shape,
            format_name=self.format_name,
            parts=self._parts,
            dtype=self._dtype,
            device=device,
            uniform=self._uniform,
        )
        copy._matrices = tuple(matrix.to(device) for matrix in self.matrices)
        return copy

    def _take(self, part: int, matrix: QuantisedMatrix | torch.Tensor) -> None:
        self._loaded[part] = matrix
        if len(self._loaded) < len(self._parts):
            return
        runs: list[list[QuantisedMatrix | torch.Tensor]] = []
        for index in range(len(self._parts)):
            below = self._loaded.pop(index)
            if runs and _fit(runs[-1][0], below):
                runs[-1].append(below)
            else:
                runs.append([below])
        if self._uniform and len(runs) > 1:
            runs = [[self._dense(matrix) for run in runs for matrix in run]]
        self._matrices = tuple(_joined(run) for run in runs)

    def _dense(self, matrix: QuantisedMatrix | torch.Tensor) -> torch.Tensor:
        return matrix if isinstance(matrix, torch.Tensor) else matrix.to_float().to(self._dtype)


def _fit(above: QuantisedMatrix | torch.Tensor, below: QuantisedMatrix | torch.Tensor) -> bool:
    match above, below:
        case torch.Tensor(), torch.Tensor():
            return True
        case Float8Blocks(), Float8Blocks():
            return above.fits(below)
        case Int4Groups(), Int4Groups():
            return above.fits(below)
        case Float4Groups(), Float4Groups():
            return above.fits(below)
    return False


def _joined(run: Sequence[Any]) -> QuantisedMatrix | torch.Tensor:
    """One matrix of those that fit."""
    first = run[0]
    if len(run) == 1:
        whole: QuantisedMatrix | torch.Tensor = first
    else:
        whole = torch.cat(list(run)) if isinstance(first, torch.Tensor) else first.joined(run)
    return whole
