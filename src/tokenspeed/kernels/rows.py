"""The rows of a step as attention sees them: which tokens are whose, and where their KV lies.

Legend: T tokens, R rows, L tokens of a row, X slots of the page table, P pages of a slot,
N positions a row has once the step is done.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["PagedRow", "PagedRows", "Refillable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedRow:
    """One row: tokens start:end at positions context_len and on, with KV in `pages_P`.

    Attributes:
        start, end: the row's tokens in the flat batch.
        context_len: positions before the row's first token.
        pages_P: int32, the pages that hold positions 0 up to the row's last token.
        allowed_LN: bool, which positions each of the row's tokens sees; None for a row of one
            token, which sees all.
    """

    start: int
    end: int
    context_len: int
    pages_P: torch.Tensor
    allowed_LN: torch.Tensor | None


class Refillable(Protocol):
    """What a kernel makes of a step's rows, in memory of the device that stays."""

    def fill(self, rows: "PagedRows") -> None:
        """Write what other rows come to, as many and with as many tokens each.

        After that, what was launched on that memory serves these rows.
        """


# Not slotted: `by_row` and `kept` are in the instance so that all layers of a step share them.
@dataclass(frozen=True, kw_only=True)
class PagedRows:
    """The rows of one step in one cache group. Host values stay host values.

    Attributes:
        query_starts: int32 [R + 1]; row r runs tokens query_starts[r] : query_starts[r + 1].
        context_lens: int32 [R]; positions of the row before its first token.
        row_slots: int32 [R]; the row of the page table that belongs to each row of the step.
        page_table_XP: int32 tensor on the device; entry [slot, i] names the page that holds
            positions i * page_size and on.
        kv_slots_T: int64 tensor on the device; where each token's K and V are written:
            page * page_size + offset.
        page_size: token positions of a page.
    """

    query_starts: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    row_slots: npt.NDArray[np.int32]
    page_table_XP: torch.Tensor
    kv_slots_T: torch.Tensor
    page_size: int

    @cached_property
    def kept(self) -> "dict[Hashable, Refillable]":
        """What kernels made once for the step, each by a key of its own."""
        return {}

    @cached_property
    def by_row(self) -> Sequence[PagedRow]:
        """The rows one by one, made once per step for kernels that loop over rows."""
        starts = self.query_starts.tolist()
        rows = []
        for start, end, context_len, slot in zip(
            starts, starts[1:], self.context_lens.tolist(), self.row_slots.tolist(), strict=False
        ):
            length = context_len + end - start
            pages_P = self.page_table_XP[slot, : -(-length // self.page_size)]
            rows.append(
                PagedRow(
                    start=start,
                    end=end,
                    context_len=context_len,
                    pages_P=pages_P,
                    allowed_LN=_causal(context_len, length, pages_P.device),
                )
            )
        return tuple(rows)


def _causal(context_len: int, length: int, device: torch.device) -> torch.Tensor | None:
    if length - context_len == 1:
        return None
    queries_L1 = torch.arange(context_len, length, device=device)[:, None]
    keys_1N = torch.arange(length, device=device)[None, :]
    return keys_1N <= queries_L1
