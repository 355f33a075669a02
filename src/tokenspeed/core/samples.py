"""Which samples of a step count. A row with a draft is sampled behind each of its tokens; a sample
counts if those of its row before it are what the draft guessed.

Drafts of Leviathan et al. 2023 and Chen et al. 2023 are accepted with the probability that the
model gives a guess. Here a position is sampled as it would be without a draft, and the guess is
accepted if it is what was sampled: with the same probability, and with the same text.

Legend: R rows, S samples.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from tokenspeed.core.step import Int32Array, StepPlan

__all__ = ["Samples"]

BoolArray = npt.NDArray[np.bool_]
IndexArray = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The samples of a step.

    Attributes:
        tokens_S: the token of the step behind which each is sampled.
        later_S: whether it is sampled behind a guess.
        guesses_S: that guess, where it is.
    """

    tokens_S: IndexArray
    later_S: BoolArray
    guesses_S: Int32Array

    @classmethod
    def of(cls, plan: StepPlan) -> Self:
        """The samples of a plan."""
        rows_S, starts = plan.sample_rows, plan.query_starts
        later_S = np.zeros(len(rows_S), dtype=np.bool_)
        np.equal(rows_S[1:], rows_S[:-1], out=later_S[1:])
        tokens_S = (starts[rows_S + 1] - 1).astype(np.intp)
        if later_S.any():
            indices_S = np.arange(len(rows_S))
            of_row_S = indices_S - np.maximum.accumulate(np.where(later_S, 0, indices_S))
            decodes_S = rows_S < plan.decode_count
            tokens_S[decodes_S] = (starts[rows_S] + of_row_S)[decodes_S]
        return cls(tokens_S=tokens_S, later_S=later_S, guesses_S=plan.token_ids[tokens_S])

    def following(self, samples: IndexArray, sampled_S: Int32Array) -> IndexArray:
        """Of the samples right behind the given ones, those of whose row all guesses up to there
        were right, as the given ones' were."""
        behind = samples + 1
        behind = behind[behind < len(self.later_S)]
        right: BoolArray = self.later_S[behind] & (sampled_S[behind - 1] == self.guesses_S[behind])
        return behind[right]

    def counting(self, sampled_S: Int32Array) -> BoolArray:
        """Whether each sample counts."""
        right_S = ~self.later_S
        right_S[1:] |= sampled_S[:-1] == self.guesses_S[1:]
        wrongs_S = np.cumsum(~right_S)
        # So many there were before the row began.
        before_S = np.maximum.accumulate(np.where(self.later_S, 0, wrongs_S))
        counts_S: BoolArray = wrongs_S == before_S
        return counts_S

    def lasts(self, sampled_S: Int32Array) -> IndexArray:
        """The last sample of each row that counts, ascending."""
        counts_S = self.counting(sampled_S)
        ends_S = counts_S.copy()
        ends_S[:-1] &= ~(self.later_S[1:] & counts_S[1:])
        return np.flatnonzero(ends_S)
