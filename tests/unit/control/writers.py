"""Requests that write what they are told to, on a machine whose steps take a known time."""

import itertools
import random
from collections import deque
from typing import Any

import numpy as np

from tests.scenario.simulation import i32
from tests.unit.control.clocked import Machine
from tokenspeed.core.step import FinishReason, StepOutcome, StepPlan, StepResult, StepWork

__all__ = ["Writer", "proposing_writer", "random_text", "warm_writer"]


class Writer(Machine):
    """A machine whose requests write what they are told to, drafts or not.

    Its draft model is right so often, and says of every token that it is so sure. Whatever it
    makes up occurs in no text.

    Attributes:
        draft_us: what each drafted token adds to a step.
        guesses_max: of a draft more are not run.
        right, sure: of the draft model.
        round_us, proposed_us: what a pass of the draft model takes, and each token of it.
        read_us: what each token takes that it reads first, where it has a window.
        read: tokens that it read so.
        outcomes: all of them.
    """

    def __init__(
        self,
        *,
        draft_us: float = 5.0,
        right: float = 0.8,
        sure: float | None = None,
        round_us: float = 200.0,
        proposed_us: float = 20.0,
        read_us: float = 0.0,
        **changes: Any,
    ) -> None:
        self.draft_us = draft_us
        self.guesses_max: int | None = None
        self.right = right
        self.sure = right if sure is None else sure
        self.round_us, self.proposed_us = round_us, proposed_us
        self.read_us, self.read = read_us, 0
        self._window = changes.get("proposal_window", 0)
        self._known: dict[int, int] = {}  # by slot, positions that the draft model knows
        self._draft_model = random.Random(11)
        self.outcomes: list[StepOutcome] = []
        self.texts: dict[int, list[int]] = {}  # prompt and output, by request
        self.written: dict[int, list[int]] = {}
        self._bound: dict[int, int] = {}
        self._flights: deque[tuple[StepPlan, StepResult]] = deque()
        self._depth = changes.get("overlap_depth", 0)
        super().__init__(**{"step_drafts_max": 64, "slots_max": 8, **changes})

    def time_us(self, work: StepWork) -> int:
        time_us = self.draft_us * work.draft_tokens + self.proposed_us * work.proposed_tokens
        time_us += self.round_us * work.proposal_rounds + self.read_us * work.caught_up_tokens
        return super().time_us(work) + int(time_us)

    def write(self, request: int, prompt: list[int], output: list[int], **wishes: Any) -> None:
        """Submits a request that gets an output."""
        self.texts[request] = prompt + output
        self.written[request] = []
        self.scheduler.submit(
            request,
            i32(*prompt),
            max_new_tokens=len(output),
            stop_token_ids=i32(),
            **wishes,
        )

    def step(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.now_us)
        if plan is not None:
            self._bound.update(
                zip(plan.bound_slots.tolist(), plan.bound_requests.tolist(), strict=True)
            )
            for slot in plan.bound_slots.tolist():
                self._known[slot] = 0
            self._flights.append((plan, self.result(plan)))
        if self._flights and (plan is None or len(self._flights) > self._depth):
            landing, result = self._flights.popleft()
            self.now_us += self.time_us(StepWork.of(landing).ran(result))
            self.scheduler.commit(landing.step, result.tokens, self.now_us, result=result)
            plan = plan or landing
        outcome = self.scheduler.take_outcome()
        self.outcomes.append(outcome)
        for request, token in zip(outcome.requests.tolist(), outcome.tokens.tolist(), strict=True):
            if request in self.written:
                self.written[request].append(token)
        for request, reason in zip(
            outcome.finished.tolist(), outcome.reasons.tolist(), strict=True
        ):
            self.finished[request] = FinishReason(reason)
            if request in self.texts:
                prompt = len(self.texts[request]) - len(self.written[request])
                assert self.written[request] == self.texts[request][prompt:]
        return plan

    def result(self, plan: StepPlan) -> StepResult:
        """What a step of this plan gives."""
        samples: list[int] = []
        cuts: dict[int, int] = {}
        starts, proposed, caught_up = [0], [], 0
        asked = plan.propose_counts.tolist() or [0] * len(plan.row_slots)
        for row, count in enumerate(asked):
            slot = int(plan.row_slots[row])
            text = self.texts.get(self._bound[slot], [])
            begin, end = plan.query_starts[row : row + 2].tolist()
            start = int(plan.context_lens[row])
            decodes = row < plan.decode_count
            draft = plan.token_ids[begin + 1 : end].tolist() if decodes else []
            first = start + 1 if decodes else start + end - begin
            found = [
                7 if not text else text[at] if at < len(text) else 0
                for at in range(first, first + len(draft) + 1)
            ]
            if row in plan.sample_rows:
                samples += found
            if self.guesses_max is not None and len(draft) > self.guesses_max:
                cuts[slot] = self.guesses_max
                draft = draft[: self.guesses_max]
            right = sum(
                itertools.takewhile(bool, (a == b for a, b in zip(draft, found, strict=False)))
            )
            for at in range(first + right + 1, first + right + 1 + count):
                knows = at < len(text) and self._draft_model.random() < self.right
                proposed.append(text[at] if knows else 99_999)
            starts.append(len(proposed))
            if count and self._window:
                end = first + right + 1
                caught_up += min(end - self._known[slot], self._window) - 1
                self._known[slot] = end
        self.read += caught_up
        return StepResult(
            tokens=i32(*samples),
            logprobs=None,
            proposed_starts=i32(*starts) if len(plan.propose_counts) else i32(),
            proposed_tokens=i32(*proposed),
            proposed_chances=np.full(len(proposed), self.sure, dtype=np.float32),
            caught_up_tokens=caught_up,
            cuts=cuts,
        )

    def drafted(self) -> tuple[int, int]:
        """Tokens drafted and accepted so far."""
        stats = self.scheduler.stats()
        return stats.drafted_tokens, stats.accepted_tokens


def random_text(seed: int, count: int, kinds: int = 1000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(kinds) for _ in range(count)]


def warm_writer(**changes: Any) -> Writer:
    writer = Writer(**changes)
    writer.warm()
    return writer


def proposing_writer(**changes: Any) -> Writer:
    """One with a draft model, which has been in use for a while."""
    sizes = {"step_proposals_max": 64, "proposal_length_max": 8}
    writer = warm_writer(**{**sizes, **changes})
    for request in range(2_000_000, 2_000_003):
        writer.write(request, random_text(request, 100), random_text(request + 1, 150))
        writer.run_until(request)
    return writer
