"""The rows of a step as attention sees them: which tokens are whose, and where their KV lies.

Legend: T tokens, R rows, L tokens of a row, X slots of the page table, P pages of a slot,
N positions a row has once the step is done.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "ContextShare",
    "PagedRow",
    "PagedRows",
    "PartedRows",
    "PromptRow",
    "Refillable",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextShare:
    """Which positions of every context a rank holds where several share it.

    A page of all of them is a run of pages of theirs, one after the other: of `ranks * page_size`
    positions each rank has `page_size`. So every rank has every page, a context is shared evenly
    whatever its length, and who has a position follows from the position alone.

    Attributes:
        index: of this rank among them.
        ranks: how many share a context.
    """

    index: int
    ranks: int

    def held(self, counts: npt.NDArray[np.int64], page_size: int) -> npt.NDArray[np.int64]:
        """How many of the first `counts` positions of a context this rank has.

        Args:
            counts: any shape.
            page_size: positions of a page on a rank.
        """
        whole, rest = np.divmod(counts, page_size * self.ranks)
        found: npt.NDArray[np.int64] = whole * page_size + np.clip(
            rest - self.index * page_size, 0, page_size
        )
        return found

    def slots(
        self, slots: npt.NDArray[np.int32], page_size: int, elsewhere: int
    ) -> npt.NDArray[np.int64]:
        """Where this rank writes what goes to some slots of all ranks.

        Args:
            slots: page * ranks * page_size + offset.
            page_size: positions of a page on a rank.
            elsewhere: a slot for what other ranks keep.
        """
        pages, offsets = np.divmod(slots.astype(np.int64), page_size * self.ranks)
        owners, offsets = np.divmod(offsets, page_size)
        return np.where(owners == self.index, pages * page_size + offsets, elsewhere)


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
        page_size: token positions of a page, on this rank.
        share: which positions of a context the pages hold; None for all.
        token_counts: int32 [R]; how many of each row's tokens count, at least one. Those behind
            fill up a captured step: their KV is nowhere in the row's pages, so attention reads the
            row's positions as if it ended with the last one that counts, and what it gives for
            the others is any finite number. None where all tokens count.
    """

    query_starts: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    row_slots: npt.NDArray[np.int32]
    page_table_XP: torch.Tensor
    kv_slots_T: torch.Tensor
    page_size: int
    share: ContextShare | None = None
    token_counts: npt.NDArray[np.int32] | None = None

    def seen(self, window: int | None) -> npt.NDArray[np.int32]:
        """Of each token, the first and the end of the positions here that it sees, which are
        counted by this rank's own.

        Args:
            window: positions that a token sees, itself included; all if None.
        """
        found: npt.NDArray[np.int32] | None = self._seen.get(window)
        if found is None:
            share = self.share or ContextShare(index=0, ranks=1)
            lengths = np.diff(self.query_starts)
            ends_T = np.arange(1, 1 + int(self.query_starts[-1]), dtype=np.int64) + np.repeat(
                self.context_lens - self.query_starts[:-1], lengths
            )
            firsts_T = np.zeros_like(ends_T) if window is None else np.maximum(0, ends_T - window)
            held_T2 = share.held(np.stack((firsts_T, ends_T), axis=1), self.page_size)
            found = self._seen[window] = held_T2.astype(np.int32)
        return found

    @property
    def has_sinks(self) -> bool:
        """Whether heads' sinks count here: of ranks that share a context, for the first alone."""
        return self.share is None or self.share.index == 0

    @cached_property
    def _seen(self) -> dict[int | None, npt.NDArray[np.int32]]:
        return {}

    @cached_property
    def kept(self) -> "dict[Hashable, Refillable]":
        """What kernels made once for the step, each by a key of its own."""
        return {}

    def parted(self, seen_by_min: float) -> "PartedRows | None":
        """Rows that are long prompts, and the others; None where there is no such prompt.

        Made once per step.

        Args:
            seen_by_min: by how many of a prompt's tokens a position of it must be seen in the mean.
        """
        if seen_by_min not in self._parted:
            self._parted[seen_by_min] = self._part(seen_by_min)
        return self._parted[seen_by_min]

    @cached_property
    def _parted(self) -> "dict[float, PartedRows | None]":
        return {}

    def _part(self, seen_by_min: float) -> "PartedRows | None":
        starts, ends = self.query_starts[:-1], self.query_starts[1:]
        new_R = (ends - starts).astype(np.int64)
        pairs_R = new_R * self.context_lens + new_R * (new_R + 1) // 2
        long_R = pairs_R >= seen_by_min * (self.context_lens + new_R)
        if not long_R.any():
            return None
        prompts = tuple(
            PromptRow(
                start=int(starts[row]),
                end=int(ends[row]),
                context_len=int(self.context_lens[row]),
                slot=int(self.row_slots[row]),
            )
            for row in np.flatnonzero(long_R)
        )
        if long_R.all():
            return PartedRows(prompts=prompts)
        device = self.kv_slots_T.device
        tokens_T = torch.from_numpy(np.flatnonzero(np.repeat(~long_R, new_R))).to(device)
        others = replace(
            self,
            query_starts=np.concatenate(([0], np.cumsum(new_R[~long_R]))).astype(np.int32),
            context_lens=self.context_lens[~long_R],
            row_slots=self.row_slots[~long_R],
            kv_slots_T=self.kv_slots_T[tokens_T],
        )
        return PartedRows(prompts=prompts, others=others, tokens_T=tokens_T)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A row that is computed by itself.

    Attributes:
        start, end: its tokens in the flat batch.
        context_len: positions before the first.
        slot: its row of the page table.
    """

    start: int
    end: int
    context_len: int
    slot: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartedRows:
    """Rows of a step in two kinds.

    Attributes:
        prompts: those that are computed by themselves.
        others: the others, as of a step of their own; None if there are none.
        tokens_T: int64 on the device, which tokens of the step the others' are.
    """

    prompts: tuple[PromptRow, ...]
    others: PagedRows | None = None
    tokens_T: torch.Tensor | None = None


def _causal(context_len: int, length: int, device: torch.device) -> torch.Tensor | None:
    if length - context_len == 1:
        return None
    queries_L1 = torch.arange(context_len, length, device=device)[:, None]
    keys_1N = torch.arange(length, device=device)[None, :]
    return keys_1N <= queries_L1
