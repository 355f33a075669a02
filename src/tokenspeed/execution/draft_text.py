"""What draft models know of requests, what they are to run of them, and what they proposed.

Legend: S samples, F and M features of hidden states.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tokenspeed.core.samples import Samples
from tokenspeed.core.step import Int32Array, StepPlan

__all__ = ["DraftProposal", "DraftRow", "HeadText", "WindowText", "said_of"]


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
class WindowText:
    """A slot's request as a draft model with a window of its own knows it.

    Attributes:
        tokens: all that are known.
        seat: whose KV it has; None while it has none.
        base: where its window begins.
        done: the first position whose KV is missing, not before `base`.
        guessed: tokens that were proposed, from position `done` on, and have KV.
        used: the step in which it proposed last.
    """

    tokens: "array[int]"
    seat: int | None = None
    base: int = 0
    done: int = 0
    guessed: list[int] = field(default_factory=list)
    used: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def goes_on(self, length: int, tokens: Sequence[int]) -> None:
        """Take what follows its first `length` tokens."""
        if len(self) > length:
            del self.tokens[length:]
            self.done = min(self.done, length)
            self.base = min(self.base, length)
            self.guessed = []
        self.tokens.extend(tokens)

    def begin(self, base: int) -> None:
        """Have the window begin there, and nothing in it read."""
        self.base = self.done = base
        self.guessed = []

    def take(self) -> DraftRow:
        """All that is not read, as a row of its seat, which is sampled."""
        assert self.seat is not None
        # The last token is run in any case, since what follows it is wanted.
        for guess in self.guessed:
            if self.done == len(self) - 1 or guess != self.tokens[self.done]:
                break
            self.done += 1
        tokens = self.tokens[self.done :].tolist()
        if self.done == self.base:
            # Models know texts that begin with what stands here first.
            tokens[0] = self.tokens[0]
        row = DraftRow(self.seat, self.done - self.base, tokens, True)
        self.done = len(self)
        self.guessed = []
        return row


@dataclass(slots=True)
class HeadText:
    """A slot's request as a head of the target knows it.

    Attributes:
        done: leading positions whose KV the head has.
        tail: tokens behind these, up to the last one known.
        states_TF: the target's states of the positions from `done` on.
    """

    done: int
    tail: list[int] = field(default_factory=list)
    states_TF: torch.Tensor | None = None

    @property
    def end(self) -> int:
        """The first position whose token is not known."""
        return self.done + len(self.tail)

    def keep(self, states_TF: torch.Tensor) -> None:
        """Take the states of further positions."""
        kept = self.states_TF
        self.states_TF = states_TF if kept is None else torch.cat([kept, states_TF])

    def take(self, slot: int, count: int, *, sampled: bool) -> DraftRow:
        """The next tokens, which have KV from now on."""
        states_TF = None
        if self.states_TF is not None:
            states_TF, self.states_TF = self.states_TF[:count], self.states_TF[count:]
        row = DraftRow(slot, self.done, self.tail[:count], sampled, states_TF)
        self.done += count
        del self.tail[:count]
        return row


@dataclass(slots=True)
class DraftProposal:
    """What was proposed so far for a row of the step, behind the token at position `first`."""

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
