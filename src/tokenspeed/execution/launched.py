"""Steps that were launched, and what launches them without Python.

Legend: S sampled rows, V vocabulary.
"""

from concurrent.futures import Future
from typing import Protocol

import numpy as np
import torch

from tokenspeed.core.step import Int32Array, StepPlan, StepResult

__all__ = ["AwaitedTokens", "Launched", "LaunchedStep", "RecordedSteps"]


class AwaitedTokens:
    """Tokens that a device is still to choose; the next step may be launched before they are read.

    Args:
        tokens: int64 on the device, not to be changed by what is launched later.
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens
        self._chosen: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._chosen = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._chosen.record()

    def result(self) -> StepResult:
        """Wait for them; raises what the device's work came to."""
        if self._chosen is not None:
            self._chosen.synchronize()
        return StepResult(tokens=self._tokens.numpy().astype(np.int32), logprobs=None)


class Launched(Protocol):
    """A forward pass that somebody launched."""

    def result(self) -> StepResult:
        """Wait for the sampled tokens; raises what the forward raised."""


class RecordedSteps(Protocol):
    """Forwards that run without Python: a `StepGraph` on CPUs, `CapturedSteps` on GPUs."""

    def serves(self, plan: StepPlan) -> bool:
        """Whether a plan is one of those that were recorded."""

    def run(
        self, plan: StepPlan, *, likeliest: bool
    ) -> tuple[torch.Tensor, Int32Array | AwaitedTokens | None]:
        """Compute a plan; gives logits_SV, and the likeliest token of each sample where they are
        wanted, which is its slot's last one from now on.
        """


class LaunchedStep:
    """A forward pass under way, or over."""

    def __init__(
        self, outcome: Future[StepResult | AwaitedTokens] | StepResult | AwaitedTokens | Exception
    ) -> None:
        self._outcome = outcome

    def result(self) -> StepResult:
        """Wait for the sampled tokens; raises what the forward raised."""
        found = self._outcome
        if isinstance(found, Future):
            found = found.result()
        if isinstance(found, Exception):
            raise found
        return found.result() if isinstance(found, AwaitedTokens) else found
