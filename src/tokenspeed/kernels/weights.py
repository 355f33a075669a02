"""Weights as checkpoints give them and as kernels hold them.

Legend: O outputs, I inputs.
"""

from collections.abc import Sequence
from typing import Final, Protocol, TypeAlias

import torch

from tokenspeed.kernels.cpu.groups import PackedGroups
from tokenspeed.kernels.cpu.weights import PackedWeight
from tokenspeed.kernels.quantised_weight import QuantisedWeight

__all__ = [
    "GROUPED",
    "PACKED",
    "PACKED_FLOAT4",
    "PACKED_GROUPS",
    "PANELS",
    "BlockMatrix",
    "Matrix",
    "PackedGroups",
    "PackedWeight",
    "Stored",
]

PACKED: Final = "packed"
"""The name of the format of quantised weights that native CPU kernels read; see `PackedWeight`."""

PACKED_GROUPS: Final = "packed_groups"
"""The same of what safetensors checkpoints keep in groups of inputs; see `PackedGroups`."""

PACKED_FLOAT4: Final = "packed_float4"
"""The same of MXFP4, of which checkpoints have experts and nothing else."""

GROUPED: Final = (PACKED_GROUPS, PACKED_FLOAT4)
"""Formats of `PackedGroups`."""

PANELS: Final = ("bfloat16_panels", "float32_panels")
"""Names of the formats of dense weights that native CPU kernels read, one for each element type."""

Matrix: TypeAlias = torch.Tensor | PackedWeight | PackedGroups | QuantisedWeight
"""A matrix of weights [O, I] in a format that its kernel reads."""


class BlockMatrix(Protocol):
    """A matrix [O, I] of small integers in blocks with scales, as a GGUF file stores it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I)."""

    @property
    def quant_name(self) -> str:
        """ggml's name of the type of its blocks."""

    @property
    def blocks(self) -> torch.Tensor:
        """uint8 [O, bytes of a row]."""

    def to_float(self) -> torch.Tensor:
        """float32 [O, I], dequantised."""

    def with_rows(self, blocks: torch.Tensor) -> "BlockMatrix":
        """As many rows of the same type, of other blocks."""

    def __getitem__(self, index: tuple[slice, ...], /) -> "BlockMatrix":
        """Rows and inputs first:end of it; no block may be cut.

        Raises:
            ConfigError: one would be.
        """


class Stored(Protocol):
    """A tensor of a checkpoint, of which no more is read than is asked for."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes."""

    def __getitem__(self, index: tuple[slice, ...], /) -> torch.Tensor | BlockMatrix:
        """first:end of each dimension."""
