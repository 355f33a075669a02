"""Drafts without the guesses that a grammar forbids: what stands behind such a one cannot count.

Legend: R rows, T tokens, S samples, D decode rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from tokenspeed.core.samples import Samples
from tokenspeed.core.step import SampledLogprobs, StepPlan, StepResult

__all__ = ["CutPlan", "drafts"]


def drafts(plan: StepPlan) -> list[tuple[int, list[int]]]:
    """The slots of decode rows that have guesses, and these."""
    if not plan.has_drafts:
        return []
    starts = plan.query_starts[: plan.decode_count + 1]
    return [
        (int(plan.row_slots[row]), plan.token_ids[starts[row] + 1 : starts[row + 1]].tolist())
        for row in np.flatnonzero(np.diff(starts) > 1).tolist()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPlan:
    """A plan some of whose drafts were cut.

    Attributes:
        plan: what is left of it.
        cuts: slots whose drafts were, and how many guesses are left of each.
        kept_S: which samples of the whole plan are left.
    """

    plan: StepPlan
    cuts: Mapping[int, int]
    kept_S: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, plan: StepPlan, taken: Callable[[int, list[int]], int]) -> Self | None:
        """A plan without the guesses that may not come; None where all of them may.

        Args:
            plan: of a model without recurrences.
            taken: how many of a slot's guesses may come.
        """
        cuts = {
            slot: count
            for slot, guesses in drafts(plan)
            if (count := taken(slot, guesses)) < len(guesses)
        }
        if not cuts:
            return None
        starts = plan.query_starts
        kept_T = np.ones(len(plan.token_ids), dtype=np.bool_)
        for row, slot in enumerate(plan.row_slots[: plan.decode_count].tolist()):
            if slot in cuts:
                kept_T[starts[row] + 1 + cuts[slot] : starts[row + 1]] = False
        kept_S = kept_T[Samples.of(plan).tokens_S]
        ends_T = np.concatenate([[0], np.cumsum(kept_T)]).astype(np.int32)
        left = replace(
            plan,
            query_starts=ends_T[starts],
            token_ids=plan.token_ids[kept_T],
            sample_rows=plan.sample_rows[kept_S],
            sample_positions=plan.sample_positions[kept_S],
            groups=tuple(replace(group, kv_slots=group.kv_slots[kept_T]) for group in plan.groups),
        )
        return cls(plan=left, cuts=cuts, kept_S=kept_S)

    def whole(self, result: StepResult) -> StepResult:
        """What came of the plan that is left, as what came of the whole."""
        tokens_S = np.zeros(len(self.kept_S), dtype=np.int32)
        tokens_S[self.kept_S] = result.tokens
        return replace(
            result, tokens=tokens_S, logprobs=self._logprobs(result.logprobs), cuts=self.cuts
        )

    def _logprobs(self, found: SampledLogprobs | None) -> SampledLogprobs | None:
        if found is None:
            return None
        samples = np.flatnonzero(self.kept_S).astype(np.int32)
        return replace(found, sample_indices=samples[found.sample_indices])
