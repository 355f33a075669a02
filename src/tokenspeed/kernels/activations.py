"""Activations between ops: what one gives and the next one reads."""

from typing import Final, TypeAlias

import torch

from tokenspeed.kernels.cpu.activations import QuantisedRows

__all__ = ["QUANTISED_ROWS", "Activations", "QuantisedRows"]

QUANTISED_ROWS: Final = "quantised_rows"
"""The name of the format of rows that native products read; see `QuantisedRows`."""

Activations: TypeAlias = torch.Tensor | QuantisedRows
"""Rows [T, I] in a format that their reader knows."""
