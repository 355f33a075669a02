"""A step's rows as kernels of this solution take them: schedules on the device.

A schedule is made once a step and serves all layers. Its arrays stay where they are, so that a
captured step is run again for other rows once `StepSchedules.fill` has written theirs: what is kept
with a step's rows has that method, and nothing else of the host's goes into a launch.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.kernels.rows import PagedRows
from tokenspeed.kernels.staging import send
from tokenspeed.kernels.triton.registration import next_power_of_2
from tokenspeed.kernels.triton.schedule import (
    DRAFT_ROWS_MAX,
    ITEM_COLUMNS,
    MERGE_COLUMNS,
    Schedule,
    fold_of,
    make_schedule,
)

__all__ = ["Geometry", "Launch", "StepSchedules", "processors", "schedules_of"]

_ROWS_MIN = 16
# What an interpreter has, which stands in for a GPU.
_INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What decides a schedule beside the rows.

    Attributes:
        group: query heads of a tile, which read the same K and V.
        blocks: blocks of heads, which have programs of their own.
        rows_max: most rows of a tile where prompts are computed.
        short_rows_max: the same where a few tokens are.
        block: positions read at once.
        window: positions a token sees; None for all.
        split: positions of a fixed piece; None for balanced pieces.
    """

    group: int
    blocks: int
    rows_max: int
    short_rows_max: int
    block: int
    window: int | None
    split: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of a step: rows that have tiles of one height.

    Attributes:
        rows: rows of a tile, a power of 2.
        programs: of each block of heads.
        starts, items, merges: a `Schedule`'s, on the device.
        merge_count: merges there is room for.
        partial_count: partial results there is room for.
    """

    rows: int
    programs: int
    starts: torch.Tensor
    items: torch.Tensor
    merges: torch.Tensor
    merge_count: int
    partial_count: int


@dataclass(slots=True)
class _Class:
    """The rows of one launch, by their numbers in the step, and where its arrays lie."""

    fold: int
    height: int
    short: bool
    programs: int
    sizes: tuple[int, int, int] = (0, 0, 0)
    partials: int = 0
    device: torch.Tensor | None = None


class StepSchedules:
    """The launches of a step's attention, for all layers of one geometry.

    Args:
        rows: the step's.
        geometry: what else decides.
    """

    def __init__(self, rows: PagedRows, geometry: Geometry) -> None:
        self._geometry = geometry
        device = rows.page_table_XP.device
        lengths_R = np.diff(rows.query_starts)
        short_R = self._short(lengths_R)
        self._classes: list[_Class] = []
        for short in (True, False):
            if not (short_R == short).any():
                continue
            tall = geometry.short_rows_max if short else geometry.rows_max
            fold = fold_of(
                lengths_R[short_R == short].tolist(), group=geometry.group, rows_max=tall
            )
            self._classes.append(
                _Class(
                    fold=fold,
                    height=_height(fold, geometry),
                    short=short,
                    programs=max(1, processors(device) // geometry.blocks),
                )
            )
        for made, schedule in zip(self._classes, self._schedules(rows), strict=True):
            _make_room(made, schedule, rows, geometry.split)
        self.fill(rows)

    @property
    def launches(self) -> tuple[Launch, ...]:
        """What is to be launched, one after the other."""
        launches = []
        for made in self._classes:
            assert made.device is not None
            starts, items, merges = torch.split(made.device, list(made.sizes))
            launches.append(
                Launch(
                    rows=made.height,
                    programs=made.programs,
                    starts=starts,
                    items=items,
                    merges=merges,
                    merge_count=made.sizes[2] // MERGE_COLUMNS,
                    partial_count=made.partials,
                )
            )
        return tuple(launches)

    def fill(self, rows: PagedRows) -> None:
        """Write the schedules of other rows, as many and with as many tokens each, to where those
        of the first are."""
        for made, schedule in zip(self._classes, self._schedules(rows), strict=True):
            packed = np.zeros(sum(made.sizes), dtype=np.int32)
            at = 0
            for part, size in zip(
                (schedule.starts, schedule.items, schedule.merges), made.sizes, strict=True
            ):
                assert part.size <= size, "room was made for every step of these rows"
                packed[at : at + part.size] = part.reshape(-1)
                at += size
            assert schedule.partials <= made.partials
            assert made.device is not None
            send(packed, made.device)

    def _short(self, lengths_R: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        geometry = self._geometry
        if geometry.split is not None:
            # One height of tiles, so that a token's sums do not depend on what shares its step.
            return np.zeros(len(lengths_R), dtype=np.bool_)
        short_R: npt.NDArray[np.bool_] = lengths_R * geometry.group <= geometry.short_rows_max
        return short_R

    def _schedules(self, rows: PagedRows) -> list[Schedule]:
        lengths_R = np.diff(rows.query_starts)
        short_R = self._short(lengths_R)
        counts_R = rows.token_counts
        found = []
        for made in self._classes:
            of_R = short_R == made.short
            found.append(
                make_schedule(
                    rows.query_starts[:-1][of_R],
                    rows.query_starts[1:][of_R],
                    rows.context_lens[of_R],
                    rows.row_slots[of_R],
                    fold=made.fold,
                    block=self._geometry.block,
                    programs=made.programs,
                    window=self._geometry.window,
                    split=self._geometry.split,
                    token_counts=None if counts_R is None else counts_R[of_R],
                )
            )
        return found


def schedules_of(rows: PagedRows, geometry: Geometry) -> tuple[Launch, ...]:
    """The launches of a step, made by the first layer that asks and kept for the others."""
    made = rows.kept.get(geometry)
    if made is None:
        made = rows.kept[geometry] = StepSchedules(rows, geometry)
    assert isinstance(made, StepSchedules)
    return made.launches


def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _height(fold: int, geometry: Geometry) -> int:
    if geometry.split is not None:
        # One height, whatever the batch's fold is.
        fold = max(1, geometry.rows_max // geometry.group)
    return max(_ROWS_MIN, next_power_of_2(fold * geometry.group))


def _make_room(made: _Class, schedule: Schedule, rows: PagedRows, split: int | None) -> None:
    """Arrays for any step whose rows have as many tokens.

    Balanced, a program's beginning cuts at most one tile. Fixed, a tile has as many pieces as the
    page table allows it; prompts, whose steps are never run again for others, as many as they have.
    """
    device = rows.page_table_XP.device
    tiles = len(schedule.items) - schedule.partials + len(schedule.merges)
    items, merges, partials = tiles + made.programs, made.programs, 2 * made.programs
    if split is not None:
        items, merges, partials = len(schedule.items), len(schedule.merges), schedule.partials
        if int(np.diff(rows.query_starts).max()) <= DRAFT_ROWS_MAX:
            positions = rows.page_table_XP.shape[1] * rows.page_size
            items = partials = tiles * -(-positions // split)
            merges = tiles
    made.partials = partials
    made.sizes = (len(schedule.starts), items * ITEM_COLUMNS, merges * MERGE_COLUMNS)
    made.device = torch.zeros(sum(made.sizes), dtype=torch.int32, device=device)
