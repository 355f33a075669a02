"""A runner without a model: the next token is a function of the last one and its position."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from tokenspeed.core.step import StepPlan, StepResult

__all__ = ["FakeRunner", "next_token"]


def next_token(last: Any, position: Any, vocabulary: int = 1000) -> Any:
    """What the fake samples after token `last` at `position` of a request; arrays or ints."""
    return (last * 31 + position * 17 + 7) % vocabulary


class FakeRunner:
    """Takes plans as `tokenspeed.execution.Runner` does; `script` maps the index of an output
    token to the token that every request gets there."""

    def __init__(
        self, *, vocabulary: int = 1000, slots_max: int = 64, script: dict[int, int] | None = None
    ) -> None:
        self.vocabulary = vocabulary
        self.script = script or {}
        self.last_tokens = np.zeros(slots_max, dtype=np.int64)
        self.bound: dict[int, dict[str, Any]] = {}

    def bind(self, slot: int, params: Any, **request: Any) -> None:
        self.bound[slot] = {"params": params, **request}

    def launch(self, plan: StepPlan) -> SimpleNamespace:
        slots, ends = plan.row_slots[plan.sample_rows], plan.query_starts[plan.sample_rows + 1]
        lengths = ends - plan.query_starts[plan.sample_rows]
        positions = plan.context_lens[plan.sample_rows] + lengths - 1
        decodes = plan.sample_rows < plan.decode_count
        last = np.where(decodes, self.last_tokens[slots], plan.token_ids[ends - 1])
        tokens = next_token(last, positions, self.vocabulary)
        for entry, index in enumerate(plan.sample_positions.tolist() if self.script else ()):
            tokens[entry] = self.script.get(index, tokens[entry])
        self.last_tokens[slots] = tokens
        result = StepResult(tokens=tokens.astype(np.int32), logprobs=None)
        return SimpleNamespace(result=lambda: result)

    def close(self) -> None:
        pass
