"""Table lookups.

Legend: T tokens, S sampled tokens, V vocabulary, M model features.
"""

import torch

from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.registry import ANY, Priority, kernel

__all__ = ["lookup", "take"]


@kernel("embedding.lookup", solution="reference", formats=DENSE, priority=Priority.REFERENCE)
def lookup(token_ids_T: torch.Tensor, table_VM: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The rows of the table."""
    x_TM = table_VM.index_select(0, token_ids_T).float()
    return x_TM if scale == 1.0 else x_TM * scale


@kernel("embedding.take", solution="reference", formats=ANY, priority=Priority.REFERENCE)
def take(x_TM: torch.Tensor, indices_S: torch.Tensor) -> torch.Tensor:
    """The rows of the batch."""
    return x_TM.index_select(0, indices_S)
