"""A smaller model of the target's vocabulary that proposes how requests go on.

It reads nothing of a request until a proposal is wanted, and then its last tokens only: as many as
its window has, however long the request is, as if they were a text of their own that begins with
the request's first token. What it read stays, and the window grows, until it reaches the end of its
*seat*: pages of the draft model's own, of which a few requests at once have some. Who has none
takes that of who has not proposed for longest. What is read again after that, or after a request
came back to a slot, is as little as at first.

A proposal is verified as any draft is, so that it is made of a part of the text costs acceptance
and never a token.

Legend: R rows, S samples, P pages of a seat.
"""

from array import array
from dataclasses import replace

import numpy as np
import torch

from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.step import GroupPlan, Int32Array, StepPlan
from tokenspeed.execution.buffers import PageTable
from tokenspeed.execution.captured import Capture
from tokenspeed.execution.draft_passes import Drafting, DraftPasses, Proposals
from tokenspeed.execution.draft_text import DraftProposal, DraftRow, WindowText, said_of

__all__ = ["WindowDrafts", "seat_pages"]

# Windows of a seat: so rarely is a request that writes on read again.
_SEAT_WINDOWS = 3
# Steps that a seat is left to who has it.
_KEPT_STEPS = 64

_NONE = np.zeros(0, dtype=np.int32)


def seat_pages(window: int, page_size: int) -> int:
    """Pages of a seat for windows of so many tokens."""
    return -(-_SEAT_WINDOWS * window // page_size)


class WindowDrafts:
    """Knows what requests say, and proposes where it is asked to.

    Args:
        drafting: the model; its pools have pages for whole seats.
        config: of the target's steps.
        vocabulary: tokens that the target has logits of.
        device: where it runs.
        capture: what records launches on a GPU; None on a CPU.
    """

    def __init__(
        self,
        drafting: Drafting,
        config: SchedulerConfig,
        *,
        vocabulary: int,
        device: torch.device,
        capture: Capture | None,
    ) -> None:
        self._window = drafting.window
        pages = seat_pages(drafting.window, config.page_size)
        seats = drafting.pools.pools[0].pages // pages
        self._room = min(pages * config.page_size, drafting.model.config.context_max)
        self._passes = DraftPasses(
            drafting,
            # A seat is to the passes what a slot is to the target's steps.
            replace(config, slots_max=seats, context_max=self._room),
            vocabulary=vocabulary,
            tables=[
                _seat_table(seats, pages, padded=capture is not None, device=device)
                for _ in drafting.pools.pools
            ],
            device=device,
            capture=capture,
        )
        self._texts: dict[int, WindowText] = {}
        self._free = list(range(seats))
        self._steps = 0

    def record(self) -> None:
        """Record the forward where the device can; to be called once."""
        self._passes.record()

    def bind(self, slot: int, tokens: Int32Array | None) -> None:
        """The slot is another request's from the next step on.

        Args:
            slot: which.
            tokens: its prompt and output so far; None where nothing is to be proposed for it.
        """
        text = self._texts.pop(slot, None)
        if text is not None and text.seat is not None:
            self._free.append(text.seat)
        if tokens is not None:
            self._texts[slot] = WindowText(array("i", tokens.tobytes()))

    def follow(
        self,
        plan: StepPlan,
        tokens_S: Int32Array,
        states_TF: torch.Tensor | None,
    ) -> Proposals:
        """Go along with a step of the target.

        Args:
            plan: what ran.
            tokens_S: what was sampled.
            states_TF: of the target; not read.
        """
        self._steps += 1
        rows: list[DraftRow] = []
        proposals: dict[int, DraftProposal] = {}
        asking: list[WindowText] = []
        asked = plan.propose_counts.tolist()
        said = said_of(plan, tokens_S)
        for row, (slot, tokens) in enumerate(zip(plan.row_slots.tolist(), said, strict=True)):
            text = self._texts.get(slot)
            if text is None or not tokens:
                continue
            start, end = plan.query_starts[row : row + 2].tolist()
            length = int(plan.context_lens[row]) + (1 if row < plan.decode_count else end - start)
            if len(text) < length:
                # Some of it is not known here.
                self.bind(slot, None)
                continue
            text.goes_on(length, tokens)
            if asked[row] and self._seat(text, asked[row]):
                rows.append(text.take())
                first = len(text) - text.base - 1
                proposals[row] = DraftProposal(slot=rows[-1].slot, first=first, most=asked[row])
                asking.append(text)
        caught_up = sum(len(row.tokens) - 1 for row in rows)
        self._passes.propose(rows, list(proposals.values()))
        for text, proposal in zip(asking, proposals.values(), strict=True):
            text.guessed = proposal.tokens[:-1]
        return Proposals.of(len(said), proposals, caught_up=caught_up)

    def _seat(self, text: WindowText, most: int) -> bool:
        """Whether a text has a seat, and room in it for proposals; it may be given both."""
        if text.seat is None:
            if not self._free:
                holding = [other for other in self._texts.values() if other.seat is not None]
                oldest = min(holding, key=lambda other: other.used)
                if oldest.used > self._steps - _KEPT_STEPS:
                    return False
                assert oldest.seat is not None
                self._free.append(oldest.seat)
                oldest.seat = None
            text.seat = self._free.pop()
            text.begin(self._base(text, most))
        elif len(text) + most - text.base > self._room or len(text) - text.done > self._window:
            text.begin(self._base(text, most))
        text.used = self._steps
        return True

    def _base(self, text: WindowText, most: int) -> int:
        return max(len(text) - min(self._window, self._room - most), 0)


def _seat_table(seats: int, pages: int, *, padded: bool, device: torch.device) -> PageTable:
    """Seat s has the pages from s * `pages` on."""
    table = PageTable(slots_max=seats + padded, pages_max=pages, device=device)
    table.apply(
        GroupPlan(
            kv_slots=_NONE,
            table_slots=np.repeat(np.arange(seats, dtype=np.int32), pages),
            table_indices=np.tile(np.arange(pages, dtype=np.int32), seats),
            table_pages=np.arange(seats * pages, dtype=np.int32),
        )
    )
    return table
