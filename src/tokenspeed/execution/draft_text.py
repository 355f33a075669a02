"""What a draft model knows of requests, what it is to run of them, and what it proposed.

Legend: S samples, F and M features of hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tokenspeed.core.samples import Samples
from tokenspeed.core.step import Int32Array, StepPlan

__all__ = ["DraftProposal", "DraftRow", "DraftText", "said_of"]


@dataclass(slots=True)
class DraftText:
    """A slot's request as the draft model knows it.

    Attributes:
        done: leading positions whose KV the draft model has.
        tail: tokens behind these, up to the last one known.
        guessed: tokens that were proposed, from position `done` on, and have KV.
        states_TF: for a head, the target's states of the positions from `done` on.
    """

    done: int
    tail: list[int] = field(default_factory=list)
    guessed: list[int] = field(default_factory=list)
    states_TF: torch.Tensor | None = None

    @property
    def end(self) -> int:
        """The first position whose token is not known."""
        return self.done + len(self.tail)

    def goes_on(self, tokens: Sequence[int]) -> None:
        """Take further tokens, of which those that were guessed have KV already."""
        self.tail += tokens
        # The last token is run once more, since what follows it is wanted.
        while len(self.tail) > 1 and self.guessed:
            if self.guessed.pop(0) != self.tail[0]:
                self.guessed = []
                return
            self.done += 1
            del self.tail[0]

    def keep(self, states_TF: torch.Tensor) -> None:
        """Take the states of further positions."""
        kept = self.states_TF
        self.states_TF = states_TF if kept is None else torch.cat([kept, states_TF])

    def take(self, slot: int, count: int, *, sampled: bool) -> "DraftRow":
        """The next tokens, which have KV from now on."""
        states_TF = None
        if self.states_TF is not None:
            states_TF, self.states_TF = self.states_TF[:count], self.states_TF[count:]
        row = DraftRow(slot, self.done, self.tail[:count], sampled, states_TF)
        self.done += count
        del self.tail[:count]
        self.guessed = []
        return row


@dataclass(slots=True)
class DraftRow:
    """Tokens of a slot to be run, and whether what follows them is wanted."""

    slot: int
    first: int
    tokens: list[int]
    sampled: bool
    states_TF: torch.Tensor | None = None

    def cut(self, count: int) -> "tuple[DraftRow, DraftRow]":
        """Its first tokens, and the others."""
        first_TF = rest_TF = None
        if self.states_TF is not None:
            first_TF, rest_TF = self.states_TF[:count], self.states_TF[count:]
        head, tail = self.tokens[:count], self.tokens[count:]
        return (
            DraftRow(self.slot, self.first, head, self.sampled and not tail, first_TF),
            DraftRow(self.slot, self.first + count, tail, self.sampled, rest_TF),
        )


@dataclass(slots=True)
class DraftProposal:
    """What was proposed so far for a row of the step."""

    slot: int
    first: int
    most: int
    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    chance: float = 1.0
    states_1M: torch.Tensor | None = None

    def take(self, token: int, chance: float) -> None:
        self.tokens.append(token)
        self.chances.append(chance)
        self.chance *= chance


def said_of(plan: StepPlan, tokens_S: Int32Array) -> list[list[int]]:
    """Of each row the samples that count."""
    said: list[list[int]] = [[] for _ in plan.row_slots]
    counting_S = Samples.of(plan).counting(tokens_S)
    for row, token, counts in zip(
        plan.sample_rows.tolist(), tokens_S.tolist(), counting_S.tolist(), strict=True
    ):
        if counts:
            said[row].append(token)
    return said
