"""What the engine does without a server around it: prompts, decoding, and many users decoding.

Prompts are random tokens that nothing shares; answers are greedy.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from tokenspeed.bench.live.statistics import Estimate, estimate
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError, EngineError
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.engine.wire import Submit

if TYPE_CHECKING:
    # It imports torch, which whoever measures imports anyway, and nobody else should.
    from tokenspeed.engine.core import EngineCore

__all__ = ["OfflinePlan", "OfflineReport", "OfflineRow", "measure_offline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflinePlan:
    """What is measured.

    Attributes:
        prefill: lengths of prompts, each computed alone.
        decode: depths at which one user decodes.
        batch: numbers of users that decode together, each at `batch_depth`.
        new_tokens: of each answer that is decoded.
        repeats: of all pieces of work; one more warms up.
        seed: of prompts.
    """

    prefill: tuple[int, ...] = (512, 2048)
    decode: tuple[int, ...] = (16, 4096)
    batch: tuple[int, ...] = (1, 2, 4, 8)
    batch_depth: int = 512
    new_tokens: int = 64
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 2:
            raise ConfigError(f"--new-tokens must be at least 2, but is {self.new_tokens}")
        if not self.works:
            raise ConfigError("nothing is asked for: give --prefill, --decode or --batch")

    @property
    def works(self) -> tuple[tuple[str, int, int], ...]:
        """(work, tokens, users), as in `OfflineRow`."""
        return (
            *(("prefill", tokens, 1) for tokens in self.prefill),
            *(("decode", tokens, 1) for tokens in self.decode),
            *(("batch", self.batch_depth, users) for users in self.batch),
        )

    def configure(self, config: EngineConfig) -> EngineConfig:
        """An engine's configuration with room for the plan, that keeps nothing it has seen, and
        computes each token: prompts of random tokens are answered by repeating oneself, of which
        drafts would make more than they are worth to anybody."""
        longest = max(tokens for _, tokens, _ in self.works) + self.new_tokens
        users = max(users for _, _, users in self.works)
        return dataclasses.replace(
            config,
            prefix_cache=False,
            speculate="off",
            max_running=users,
            # A step has a token of each.
            max_step_tokens=max(config.max_step_tokens, users),
            max_context=longest if config.max_context is None else config.max_context,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRow:
    """One piece of work.

    Attributes:
        work: "prefill", "decode" or "batch".
        tokens: of each prompt.
        users: at once.
        tokens_per_s: of "prefill" prompt tokens, until the first token is there. Else of all
            users' answers, from the moment when each has its first token until one is done.
    """

    work: str
    tokens: int
    users: int
    tokens_per_s: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineReport:
    """All pieces of work of a model."""

    version: str
    machine: str
    model: str
    plan: OfflinePlan
    rows: tuple[OfflineRow, ...]

    def to_json(self) -> bytes:
        """The report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def measure_offline(
    core: "EngineCore",
    plan: OfflinePlan,
    *,
    watch: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[OfflineRow, ...]:
    """Measure an engine of `plan.configure` that nobody else uses.

    All pieces of work are done before any is repeated, so that a machine's drift meets all alike.

    Args:
        watch: told of each piece of work as it begins.

    Raises:
        EngineError: an answer has not the tokens that were asked for.
    """
    stepper = _Stepper(core, plan, clock)
    rates: dict[tuple[str, int, int], list[float]] = {work: [] for work in plan.works}
    for repeat in range(plan.repeats + 1):
        for (name, tokens, users), found in rates.items():
            if watch is not None:
                watch(f"{name}, {tokens} tokens, {users} users")
            rate = stepper.prefill(tokens) if name == "prefill" else stepper.decode(tokens, users)
            if repeat:
                found.append(rate)
    return tuple(
        OfflineRow(work=name, tokens=tokens, users=users, tokens_per_s=estimate(found))
        for (name, tokens, users), found in rates.items()
    )


class _Stepper:
    def __init__(self, core: "EngineCore", plan: OfflinePlan, clock: Callable[[], float]) -> None:
        self._core = core
        self._new_tokens = plan.new_tokens
        self._clock = clock
        self._requests = itertools.count()
        self._rng = np.random.default_rng(plan.seed)

    def prefill(self, tokens: int) -> float:
        start_s, ((first_s,),) = self._run(tokens, 1, new_tokens=1)
        return tokens / (first_s - start_s)

    def decode(self, tokens: int, users: int) -> float:
        _, times_s = self._run(tokens, users, new_tokens=self._new_tokens)
        # Until each has its first token, steps carry prompts as well.
        begun_s = max(times[0] for times in times_s)
        ended_s = min(times[-1] for times in times_s)
        if ended_s <= begun_s:
            raise EngineError(
                f"{users} users of {tokens} tokens did not decode together: one was done before "
                "another had begun; give more --new-tokens, or a larger KV cache"
            )
        counted = sum(begun_s < at_s <= ended_s for times in times_s for at_s in times)
        return counted / (ended_s - begun_s)

    def _run(self, tokens: int, users: int, *, new_tokens: int) -> tuple[float, list[list[float]]]:
        """When it began, and when each user's tokens came."""
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        prompts = [
            self._rng.integers(1000, 40000, tokens, dtype=np.int32).tobytes() for _ in range(users)
        ]
        times_s: dict[int, list[float]] = {}
        start_s = self._clock()
        for prompt in prompts:
            request = next(self._requests)
            times_s[request] = []
            self._core.submit(Submit(request, prompt, params, new_tokens, 0, 0, 0, None))
        while self._core.busy:
            outputs = self._core.step()
            if outputs is not None and outputs.requests:
                now_s = self._clock()
                for request in np.frombuffer(outputs.requests, dtype=np.int64).tolist():
                    times_s[request].append(now_s)
        for times in times_s.values():
            if len(times) != new_tokens:
                raise EngineError(f"{new_tokens} tokens were asked for, but {len(times)} came")
        return start_s, list(times_s.values())
