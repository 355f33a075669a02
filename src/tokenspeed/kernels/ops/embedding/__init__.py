"""Owns the declarations of table lookups; never computes one.

Legend: T tokens, S sampled tokens, V vocabulary, M model features.
"""

import torch

from tokenspeed.kernels.registry import declare_op
from tokenspeed.kernels.weights import Matrix

__all__ = ["lookup", "take"]


@declare_op("embedding.lookup")
def lookup(
    token_ids_T: torch.Tensor, table_VM: Matrix, scale: float = 1.0, first: int | None = None
) -> torch.Tensor:
    """x_TM = scale * table_VM[token_ids_T] in float32; ids are int64 and within the vocabulary.

    Where a rank has some of the vocabulary's rows, `first` is which of them is the table's first,
    and other tokens get zeros.
    """
    operand = table_VM if isinstance(table_VM, torch.Tensor) else token_ids_T
    return lookup.best(operand, weight=table_VM)(token_ids_T, table_VM, scale, first)


@declare_op("embedding.take")
def take(x_TM: torch.Tensor, indices_S: torch.Tensor) -> torch.Tensor:
    """x_SM = x_TM[indices_S], in x's type; indices are int64 and below T."""
    return take.best(x_TM)(x_TM, indices_S)
