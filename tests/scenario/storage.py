"""What one cache group of a simulated device holds, and what each row should find there."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenspeed.core.config import CacheGroup, CacheGroupKind
from tokenspeed.core.step import GroupPlan, Int32Array, StepPlan

__all__ = ["NOTHING", "GroupStorage", "Row", "state_after"]

NOTHING = -1  # A cell, or an entry of a page table, that was never written.


def state_after(history: Int32Array) -> int:
    """The state of a recurrence that was fed a history: every token counts, and their order."""
    return zlib.crc32(history.astype(np.int32).tobytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request's part of a step: it feeds `tokens`, from position `start` on."""

    slot: int
    request: int
    start: int
    tokens: Int32Array
    salt: int
    history: Int32Array  # what it should see, its own tokens included
    doubtful: int = 0  # of the tokens, the last ones that are wrong guesses


class GroupStorage:
    """Cells of pages on the device and on the host, and the page table."""

    def __init__(self, group: CacheGroup, config: Any) -> None:
        self.group = group
        self.size = config.page_size
        self.paged = group.kind is not CacheGroupKind.RECURRENT
        cells = self.size if self.paged else 1
        # token, position and salt; of a recurrence state, length and salt
        self.pages = np.full((group.pages, cells, 3), NOTHING, dtype=np.int64)
        self.host = np.full((group.host_pages, cells, 3), NOTHING, dtype=np.int64)
        width = -(-config.context_max // config.page_size)
        self.table = np.full((config.slots_max, width), NOTHING, dtype=np.int64)

    def bind(self, slot: int) -> None:
        """A request takes the slot: what was there means nothing to it."""
        self.table[slot] = NOTHING

    def begin(self, plan: GroupPlan) -> None:
        """What comes before the forward. Loads are done at once, wherever they are reported."""
        for source, target in _pairs(plan.stores.sources, plan.stores.targets):
            self.host[target] = self.pages[source]
        for source, target in _pairs(plan.loads.elsewhere, plan.loads.pages):
            self.pages[target] = self.host[source]
        for slot, index, page in zip(
            plan.table_slots, plan.table_indices, plan.table_pages, strict=True
        ):
            self.table[slot, index] = page
        for source, target in _pairs(plan.copies.sources, plan.copies.targets):
            self.pages[target] = self.pages[source]

    def end(self, plan: GroupPlan) -> None:
        """What comes after the forward."""
        for source, target in _pairs(plan.saves.sources, plan.saves.targets):
            self.pages[target] = self.pages[source]

    def write(self, row: Row, kv_slots: Int32Array) -> set[int]:
        """Feeds the row; the pages it reads or writes."""
        end = row.start + len(row.tokens)
        if not self.paged:
            page = int(self.table[row.slot, 0])
            self._feed(row, page)
            return {page}
        positions = np.arange(row.start, end)
        pages = self.table[row.slot, positions // self.size]
        cells = pages * self.size + positions % self.size
        assert (kv_slots == cells).all(), "KV goes where the page table does not say"
        self.pages[pages, positions % self.size] = np.stack(
            [row.tokens, positions, np.full(len(positions), row.salt)], axis=1
        )
        return {int(page) for page in self.table[row.slot, np.unique(self._seen(row) // self.size)]}

    def written(self, row: Row) -> set[int]:
        """The pages a row writes."""
        if not self.paged:
            return {int(self.table[row.slot, 0])}
        positions = np.arange(row.start, row.start + len(row.tokens))
        return {int(page) for page in np.unique(self.table[row.slot, positions // self.size])}

    def check(self, row: Row) -> None:
        """What the row's last token sees is its own history, all of it that it may see."""
        end = row.start + len(row.tokens)
        shown = row.history[:end]
        if not self.paged:
            # A doomed row runs past the end of its request; nobody will see its token.
            state, length, salt = self.pages[int(self.table[row.slot, 0]), 0]
            assert (length, salt) == (end, row.salt)
            assert end > len(row.history) or state == state_after(shown)
            return
        positions = self._seen(row)
        pages = self.table[row.slot, positions // self.size]
        assert (pages != NOTHING).all(), f"request {row.request} reads a page it was never given"
        seen = self.pages[pages, positions % self.size]
        assert (seen[:, 1] == positions).all(), f"request {row.request} sees wrong positions"
        assert (seen[:, 2] == row.salt).all(), f"request {row.request} sees another salt"
        # A row sees its own wrong guesses, and nobody else ever does.
        known = positions < min(len(row.history), row.start + len(row.tokens) - row.doubtful)
        assert (seen[known, 0] == row.history[positions[known]]).all(), (
            f"request {row.request} sees other tokens"
        )

    def receive(
        self, plan: StepPlan, group: int, transfer: int, history: Int32Array, salt: int
    ) -> None:
        """Another engine writes what a transfer should bring."""
        cargo = plan.groups[group].handovers
        for index, page in _pairs(
            cargo.elsewhere[cargo.transfers == transfer], cargo.pages[cargo.transfers == transfer]
        ):
            if not self.paged:
                self.pages[page, 0] = (state_after(history), len(history), salt)
                continue
            positions = np.arange(index * self.size, min((index + 1) * self.size, len(history)))
            self.pages[page, : len(positions)] = np.stack(
                [history[positions], positions, np.full(len(positions), salt)], axis=1
            )

    def check_sent(
        self, plan: StepPlan, group: int, transfer: int, history: Int32Array, salt: int
    ) -> None:
        """What another engine reads is what the request wrote."""
        cargo = plan.groups[group].handovers
        mine = cargo.transfers == transfer
        covered = 0
        for index, page in _pairs(cargo.elsewhere[mine], cargo.pages[mine]):
            if not self.paged:
                assert tuple(self.pages[page, 0]) == (state_after(history), len(history), salt)
                return
            positions = np.arange(index * self.size, min((index + 1) * self.size, len(history)))
            seen = self.pages[page, : len(positions)]
            assert (seen[:, 0] == history[positions]).all() and (seen[:, 1] == positions).all()
            assert (seen[:, 2] == salt).all()
            covered += len(positions)
        # The next token sees itself and the window's other tokens.
        seen_count = len(history) if self.group.window is None else self.group.window - 1
        assert self.paged and covered >= min(len(history), seen_count)

    def _seen(self, row: Row) -> np.ndarray:
        """Positions that any token of the row sees; of a window, less than all before it."""
        window = self.group.window
        first = 0 if window is None else max(0, row.start - window + 1)
        return np.arange(first, row.start + len(row.tokens))

    def _feed(self, row: Row, page: int) -> None:
        state, length, salt = self.pages[page, 0]
        if row.start:
            assert (length, salt) == (row.start, row.salt), "a state of another length or salt"
            state = zlib.crc32(row.tokens.astype(np.int32).tobytes(), int(state))
        else:
            state = state_after(row.tokens)
        self.pages[page, 0] = (state, row.start + len(row.tokens), row.salt)


def _pairs(sources: Int32Array, targets: Int32Array) -> list[tuple[int, int]]:
    return list(zip(sources.tolist(), targets.tolist(), strict=True))
