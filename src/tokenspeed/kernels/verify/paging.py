"""Rows of a step over scattered pages, for cases of what reads and writes KV."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from tokenspeed.kernels.rows import PagedRows

__all__ = ["row_lengths", "scattered_rows", "written_slots"]


def scattered_rows(
    lengths: Sequence[tuple[int, int]], *, page_size: int, seed: int
) -> tuple[PagedRows, int]:
    """Rows of (context, new) tokens over pages in random order, and how many pages there are."""
    choose = np.random.default_rng(seed)
    counts = [-(-(context + new) // page_size) for context, new in lengths]
    pages = sum(counts) + 3
    order = choose.permutation(pages).astype(np.int32)
    slots = choose.permutation(len(lengths) + 2).astype(np.int32)[: len(lengths)]
    table_XP = np.full((len(lengths) + 2, max(counts)), -1, dtype=np.int32)
    kv_slots = []
    used = 0
    for (context, new), count, slot in zip(lengths, counts, slots, strict=True):
        own = order[used : used + count]
        used += count
        table_XP[slot, :count] = own
        at = np.arange(context, context + new)
        kv_slots.append(own[at // page_size].astype(np.int64) * page_size + at % page_size)
    return (
        PagedRows(
            query_starts=np.cumsum([0, *(new for _, new in lengths)], dtype=np.int32),
            context_lens=np.array([context for context, _ in lengths], dtype=np.int32),
            row_slots=slots,
            page_table_XP=torch.from_numpy(table_XP),
            kv_slots_T=torch.from_numpy(np.concatenate(kv_slots)),
            page_size=page_size,
        ),
        pages,
    )


def written_slots(rows: PagedRows) -> torch.Tensor:
    """KV slots of all positions that rows have once the step is done."""
    lengths = rows.context_lens + np.diff(rows.query_starts)
    found = []
    for slot, length in zip(rows.row_slots.tolist(), lengths.tolist(), strict=True):
        at_N = torch.arange(length)
        pages_N = rows.page_table_XP[slot][at_N // rows.page_size].long()
        found.append(pages_N * rows.page_size + at_N % rows.page_size)
    return torch.cat(found)


def row_lengths(rows: PagedRows) -> Iterator[tuple[int, int]]:
    """Slot and length of each row once the step is done."""
    new = np.diff(rows.query_starts)
    yield from zip(rows.row_slots.tolist(), (rows.context_lens + new).tolist(), strict=True)
