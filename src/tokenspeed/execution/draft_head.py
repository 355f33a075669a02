"""A head of the target that reads along with every step, and proposes how requests go on.

At each position it reads the token behind, and what the target made of the position; where the
target has not been, what itself made. So its text begins with the target's second token, and is one
position ahead.

Its KV lie beside the target's, in the same pages: what is shared, moved or dropped there is so
here. A proposal is verified as any draft is, so KV that is missing or wrong, as that of a page
which was shared before the head had filled it, costs acceptance and never a token.

Legend: R rows, T tokens, S samples, F features of hidden states.
"""

from collections.abc import Sequence

import torch

from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.step import Int32Array, StepPlan
from tokenspeed.execution.buffers import PageTable
from tokenspeed.execution.captured import Capture
from tokenspeed.execution.draft_passes import Drafting, DraftPasses, Proposals
from tokenspeed.execution.draft_text import DraftProposal, DraftRow, HeadText, said_of

__all__ = ["HeadDrafts"]

# How far its text is ahead of the target's.
_AHEAD = 1


class HeadDrafts:
    """Follows the steps of a target, and proposes where it is asked to.

    Prompts are computed as their chunks are, since what the target made of them is there only then.
    Tokens that a request decodes wait until a proposal is wanted, or their page is full, and are
    computed together.

    Args:
        drafting: the head.
        config: of the target's steps.
        vocabulary: tokens that the target has logits of.
        tables: the target's page tables.
        device: where both run.
        capture: what records launches on a GPU; None on a CPU.
    """

    def __init__(
        self,
        drafting: Drafting,
        config: SchedulerConfig,
        *,
        vocabulary: int,
        tables: Sequence[PageTable],
        device: torch.device,
        capture: Capture | None,
    ) -> None:
        self._page_size = config.page_size
        self._context_max = drafting.model.config.context_max
        self._passes = DraftPasses(
            drafting,
            config,
            vocabulary=vocabulary,
            tables=[tables[group] for group in drafting.groups],
            device=device,
            capture=capture,
        )
        self._texts: dict[int, HeadText] = {}

    def record(self) -> None:
        """Record the forward where the device can; to be called once."""
        self._passes.record()

    def bind(self, slot: int, tokens: Int32Array | None) -> None:
        """The slot is another request's from the next step on; what it read before is not asked
        for."""
        self._texts.pop(slot, None)

    def follow(
        self, plan: StepPlan, tokens_S: Int32Array, states_TF: torch.Tensor | None
    ) -> Proposals:
        """Go along with a step of the target.

        Args:
            plan: what ran; page tables are as it left them.
            tokens_S: what was sampled.
            states_TF: the target's states of the step's tokens.
        """
        assert states_TF is not None, "a head reads the target's states"
        asked = plan.propose_counts.tolist()
        rows: list[DraftRow] = []
        proposals: dict[int, DraftProposal] = {}
        said = said_of(plan, tokens_S)
        for row, (slot, tokens, most) in enumerate(
            zip(plan.row_slots.tolist(), said, asked, strict=True)
        ):
            text = self._text(plan, row, slot, tokens, states_TF)
            # The last token that was sampled has no KV in the target either, perhaps no page.
            length = text.end + _AHEAD - bool(tokens)
            if length > self._context_max:
                del self._texts[slot]
                continue
            pages = -(-length // self._page_size)
            room = min(pages * self._page_size, self._context_max) - length
            wanted = min(length - text.done, len(text.tail))
            if most and tokens and room + _AHEAD > 0:
                wanted = len(text.tail)
                proposals[row] = DraftProposal(
                    slot=slot, first=length - _AHEAD, most=min(most, room + _AHEAD)
                )
            elif row < plan.decode_count and not self._leaves_page(text.done, length):
                continue
            if wanted > 0:
                rows.append(text.take(slot, wanted, sampled=row in proposals))
        self._passes.propose(rows, list(proposals.values()))
        return Proposals.of(len(said), proposals)

    def _text(
        self, plan: StepPlan, row: int, slot: int, said: Sequence[int], states_TF: torch.Tensor
    ) -> HeadText:
        """The text of a row's request, with what it ran and what was sampled behind it."""
        text = self._texts.get(slot)
        context = int(plan.context_lens[row])
        start, end = plan.query_starts[row : row + 2].tolist()
        if row < plan.decode_count:
            known = context + 1 - _AHEAD
            if text is None or text.end != known:
                # Its last token came to it elsewhere, and stays unknown here.
                text = self._texts[slot] = HeadText(done=known)
            text.tail += said
            end = start + len(said)
        else:
            tokens = plan.token_ids[start:end].tolist()
            if text is None or text.end != context - _AHEAD:
                text = self._texts[slot] = HeadText(done=context)
                tokens = tokens[_AHEAD:]
            text.tail += [*tokens, *said]
        text.keep(states_TF[start:end])
        return text

    def _leaves_page(self, done: int, length: int) -> bool:
        return length // self._page_size > done // self._page_size
