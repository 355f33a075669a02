"""Table lookups.

Legend: T tokens, V vocabulary, M model features.
"""

import torch

from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.registry import Priority, kernel

__all__ = ["lookup"]


@kernel("embedding.lookup", solution="reference", formats=DENSE, priority=Priority.REFERENCE)
def lookup(token_ids_T: torch.Tensor, table_VM: torch.Tensor) -> torch.Tensor:
    """The rows of the table."""
    return table_VM.index_select(0, token_ids_T).float()
