"""Which program of an attention kernel reads which positions for which tokens.

A *tile* is some tokens of one row; a *piece* is a range of positions of one tile. Programs stay on
their multiprocessor and take the pieces they are given one after the other; a tile of several
pieces is merged afterwards by their logarithms of sums. All is computed on the host from the
step's plan, with a number of array operations that does not grow with the rows.

*Balanced*: pieces are cut so that every program reads as much (stream-K: Osama et al. 2023; for
decoding: FlashInfer, Ye et al. 2025, section 3.3). *Fixed*: pieces are cut at multiples of a number
of positions, so that a row's result does not depend on the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "DRAFT_ROWS_MAX",
    "ITEM_COLUMNS",
    "MERGE_COLUMNS",
    "Schedule",
    "fold_of",
    "make_schedule",
]

Ints = npt.NDArray[np.int32]

DRAFT_ROWS_MAX: Final = 8
"""Most tokens of a row whose tokens were drafted; more are a prompt's."""

ITEM_COLUMNS: Final = 8
"""Of an item: first token, tokens, position of the first token, slot of the page table, first
position read, end of the positions read, number among partial results, whether it is the whole
tile."""

MERGE_COLUMNS: Final = 4
"""Of a merge: first token, tokens, first partial result, end of its partial results."""

# Fewer blocks of positions cost more to merge than to read.
_BLOCKS_MIN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Work of the programs of one launch, the same for all blocks of heads.

    Attributes:
        starts: int32 [programs + 1]; program p has items starts[p] : starts[p + 1].
        items: int32 [items, ITEM_COLUMNS].
        merges: int32 [merges, MERGE_COLUMNS], tiles of several pieces.
        partials: how many pieces are not whole tiles.
    """

    starts: Ints
    items: Ints
    merges: Ints
    partials: int


def fold_of(tokens: Sequence[int], *, group: int, rows_max: int) -> int:
    """How many tokens of a row share a tile with the `group` heads of each.

    Rows of a few tokens, as drafts make them, are folded evenly: the largest fold that divides the
    longest of them, so that no tile of theirs is filled less than another.

    Args:
        tokens: of each row.
        group: heads that read the same K and V.
        rows_max: rows of a tile of the matrix unit.
    """
    most = max(1, rows_max // group)
    longest = max(tokens)
    if longest > DRAFT_ROWS_MAX:
        return most
    return max(fold for fold in range(1, longest + 1) if longest % fold == 0 and fold <= most)


def make_schedule(
    query_starts: Ints,
    query_ends: Ints,
    context_lens: Ints,
    row_slots: Ints,
    *,
    fold: int,
    block: int,
    programs: int,
    window: int | None,
    split: int | None,
    token_counts: Ints | None = None,
) -> Schedule:
    """Work for some rows of a step.

    Args:
        query_starts, query_ends: int32 [R]; row r runs tokens query_starts[r] : query_ends[r].
        context_lens: int32 [R]; positions before a row's first token.
        row_slots: int32 [R]; rows of the page table.
        fold: most tokens of a tile.
        block: positions read at once.
        programs: how many there are for each block of heads.
        window: positions that a token sees, its own included; None for all.
        split: positions of a fixed piece, a multiple of the block; None for balanced pieces.
        token_counts: int32 [R]; how many of each row's tokens count, where the others only fill it
            up: no position behind those that count is read. A tile of none reads the last of them,
            so that what it gives is finite.
    """
    tiles_R = -(-(query_ends - query_starts) // fold)
    row_N = np.repeat(np.arange(len(tiles_R)), tiles_R)
    within_N = np.arange(len(row_N)) - np.repeat(np.cumsum(tiles_R) - tiles_R, tiles_R)
    first_N = query_starts[row_N] + within_N * fold
    tokens_N = np.minimum(query_ends[row_N] - first_N, fold)
    position_N = context_lens[row_N] + within_N * fold
    end_N = position_N + tokens_N
    begin_N = np.zeros_like(end_N)
    if window is not None:
        begin_N = np.maximum(0, position_N + 1 - window) // block * block
    if token_counts is not None:
        end_N = np.minimum(end_N, (context_lens + token_counts)[row_N])
        begin_N = np.where(position_N < end_N, begin_N, (end_N - 1) // block * block)
    if split is None:
        tile_I, from_I, to_I, program_I = _balanced(begin_N, end_N, block, programs)
    else:
        tile_I, from_I, to_I, program_I = _fixed(begin_N, end_N, split, programs)
    pieces_N = np.bincount(tile_I, minlength=len(row_N))
    whole_I = pieces_N[tile_I] == 1
    partial_I = np.cumsum(~whole_I) - ~whole_I
    items = np.stack(
        (
            first_N[tile_I],
            tokens_N[tile_I],
            position_N[tile_I],
            row_slots[row_N][tile_I],
            from_I,
            to_I,
            partial_I,
            whole_I,
        ),
        axis=1,
    ).astype(np.int32)
    (split_M,) = np.nonzero(pieces_N > 1)
    ends_M = np.cumsum(pieces_N[split_M])
    merges = np.stack(
        (first_N[split_M], tokens_N[split_M], ends_M - pieces_N[split_M], ends_M), axis=1
    ).astype(np.int32)
    starts = np.searchsorted(program_I, np.arange(programs + 1)).astype(np.int32)
    return Schedule(starts=starts, items=items, merges=merges, partials=int((~whole_I).sum()))


def _balanced(
    begin_N: Ints, end_N: Ints, block: int, programs: int
) -> tuple[npt.NDArray[np.int64], ...]:
    """Tile, first position, end and program of each piece, by cutting the line of all tiles'
    blocks into equal lengths."""
    blocks_N = -(-(end_N - begin_N) // block)
    before_N = np.concatenate(([0], np.cumsum(blocks_N))).astype(np.int64)
    total = int(before_N[-1])
    share = max(_BLOCKS_MIN, -(-total // programs))
    cuts_I = np.union1d(before_N[:-1], np.arange(0, total, share))
    tile_I = np.searchsorted(before_N, cuts_I, side="right") - 1
    next_I = np.concatenate((cuts_I[1:], [total]))
    from_I = begin_N[tile_I] + (cuts_I - before_N[tile_I]) * block
    to_I = np.minimum(begin_N[tile_I] + (next_I - before_N[tile_I]) * block, end_N[tile_I])
    return tile_I, from_I, to_I, cuts_I // share


def _fixed(
    begin_N: Ints, end_N: Ints, split: int, programs: int
) -> tuple[npt.NDArray[np.int64], ...]:
    """The same, with cuts at multiples of `split` positions; programs share pieces evenly."""
    lowest_N = begin_N // split
    pieces_N = (end_N - 1) // split - lowest_N + 1
    tile_I = np.repeat(np.arange(len(begin_N)), pieces_N)
    within_I = np.arange(len(tile_I)) - np.repeat(np.cumsum(pieces_N) - pieces_N, pieces_N)
    from_I = (lowest_N[tile_I] + within_I) * split
    to_I = np.minimum(from_I + split, end_N[tile_I])
    from_I = np.maximum(from_I, begin_N[tile_I])
    cost_I = to_I - from_I
    before_I = np.cumsum(cost_I) - cost_I
    share = max(1, -(-int(cost_I.sum()) // programs))
    return tile_I, from_I, to_I, before_I // share
