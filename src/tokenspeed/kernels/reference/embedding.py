"""Table lookups.

Legend: T tokens, S sampled tokens, V vocabulary, M model features.
"""

import torch

from tokenspeed.kernels.reference.gemm import DENSE
from tokenspeed.kernels.registry import ANY, Priority, kernel

__all__ = ["lookup", "rows_held", "take"]


@kernel("embedding.lookup", solution="reference", formats=DENSE, priority=Priority.REFERENCE)
def lookup(
    token_ids_T: torch.Tensor,
    table_VM: torch.Tensor,
    scale: float = 1.0,
    first: int | None = None,
) -> torch.Tensor:
    """The rows of the table."""
    if first is None:
        x_TM = table_VM.index_select(0, token_ids_T).float()
    else:
        ids_T, held_T1 = rows_held(token_ids_T, table_VM, first)
        x_TM = table_VM.index_select(0, ids_T).float() * held_T1
    return x_TM if scale == 1.0 else x_TM * scale


def rows_held(
    token_ids_T: torch.Tensor, table_VM: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a part of a table that begins with row `first`: ids_T within it, and held_T1, which
    of them were meant."""
    ids_T = token_ids_T - first
    held_T = (ids_T >= 0) & (ids_T < len(table_VM))
    return ids_T * held_T, held_T[:, None]


@kernel("embedding.take", solution="reference", formats=ANY, priority=Priority.REFERENCE)
def take(x_TM: torch.Tensor, indices_S: torch.Tensor) -> torch.Tensor:
    """The rows of the batch."""
    return x_TM.index_select(0, indices_S)
