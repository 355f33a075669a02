"""Rank 0's side of an engine of several ranks: has the others run every plan.

The control plane lives on rank 0, which alone samples. Each step goes to the others once, as bytes;
what ranks exchange within a step is the model's. A rank that dies or hangs ends the group: whoever
waits for it in a collective gives up after some seconds, and rank 0 says which rank it was.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tokenspeed import loader
from tokenspeed.core import errors
from tokenspeed.core.config import EngineConfig, SchedulerConfig
from tokenspeed.core.errors import ConfigError, EngineError, TokenSpeedError
from tokenspeed.core.samples import Samples
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import Int32Array, StepPlan, StepResult
from tokenspeed.distributed import Mesh, Place
from tokenspeed.engine.assembly import OpenedModel
from tokenspeed.engine.rank_launch import Member, launch_ranks
from tokenspeed.engine.rank_links import Listener
from tokenspeed.engine.rank_wire import (
    Failure,
    FromFollower,
    Launch,
    Loaded,
    Opened,
    Setup,
    Stop,
    ToFollower,
    decode_from_follower,
    encode,
    encode_plan,
)
from tokenspeed.execution import Runner
from tokenspeed.execution.runner import LaunchedStep
from tokenspeed.grammar import Grammar

__all__ = ["GroupRunner", "RankGroup"]

# How long a rank that is alive takes at most to say that a collective failed for it too.
LAST_WORDS_S = 1.0
STOP_TIMEOUT_S = 5.0
# What a rank that was started by hand must have been told as rank 0 was; the rest rank 0 tells it.
_SAME_FLAGS = ("device", "tp", "ep", "cp", "kv_dtype", "page_size", "kernels")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Follower:
    """One of the other ranks, and what it says."""

    member: Member
    listener: Listener


class RankGroup:
    """The ranks above 0 of one engine.

    Args:
        config: the engine's.
        mesh: all ranks.

    Attributes:
        place: of rank 0.

    Raises:
        ConfigError: there are not as many ranks as the mesh has, or no room for them.
        EngineError: some did not come.
    """

    def __init__(self, config: EngineConfig, mesh: Mesh) -> None:
        launched = launch_ranks(config, mesh)
        self.place: Place = launched.place
        self._config = config
        self._release = launched.release
        self._followers = [
            _Follower(member=member, listener=Listener(member.link)) for member in launched.members
        ]

    @property
    def members(self) -> list[Member]:
        """The ranks above 0 that have not been ended."""
        return [follower.member for follower in self._followers]

    def await_opened(self, opened: OpenedModel) -> int:
        """Wait until every rank has found the model.

        Args:
            opened: what this rank found.

        Returns:
            The bytes of memory that each of them may take.

        Raises:
            ConfigError: a rank was started with other flags or has another model.
            TokenSpeedError: what one of them failed for.
        """
        model = loader.fingerprint(opened.files)
        sizes = []
        for follower in self._followers:
            message = self._await(follower)
            assert isinstance(message, Opened)
            _check_same(follower.member.name, self._config, opened, model, message)
            sizes.append(message.memory_size_bytes)
        return min(sizes)

    def set_up(self, config: SchedulerConfig) -> None:
        """Have all connect and load.

        Raises:
            EngineError: one of them is gone.
        """
        self.send(Setup(config))

    def await_loaded(self) -> None:
        """Wait until every rank is ready for steps.

        Raises:
            TokenSpeedError: what one of them failed for.
        """
        for follower in self._followers:
            assert isinstance(self._await(follower), Loaded)

    def send(self, message: ToFollower) -> None:
        """Send a message to every rank.

        Raises:
            EngineError: one of them is gone, or takes nothing any more.
        """
        data = encode(message)
        for follower in self._followers:
            try:
                follower.member.link.send(data)
            except EngineError as error:
                raise self.failure(error) from error

    def check(self) -> None:
        """Raise EngineError where a rank is gone: one that serves says nothing else."""
        if not all(follower.listener.silent for follower in self._followers):
            raise self.failure(EngineError("one of them ended"))

    def failure(self, cause: Exception) -> EngineError:
        """End all ranks; gives the error that says which of them failed, and how."""
        deadline_s = time.monotonic() + LAST_WORDS_S
        found: list[str] = []
        silent: list[str] = []
        for follower in self._followers:
            name = follower.member.name
            try:
                words = _last_words(follower, deadline_s)
            except TimeoutError:
                silent.append(f"{name} does not answer")
                continue
            if words is None:
                # It closed its end, so that it is about to have ended.
                how = follower.member.ended(wait_s=0.5)
                found.append(f"{name} {'is gone' if how is None else f'ended: {how}'}")
            elif words.kind != EngineError.__name__:
                found.append(f"{name} failed: {words.kind}: {words.message}")
        self.end()
        # Ranks that only lost another one have nothing to add.
        reasons = found or silent or [f"the ranks lost each other: {cause}"]
        return EngineError(f"{'; '.join(reasons)}. All ranks of the engine were ended.")

    def stop(self) -> None:
        """Ask all ranks to end, and see to it."""
        with contextlib.suppress(EngineError):
            self.send(Stop())
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        for follower in self._followers:
            with contextlib.suppress(TimeoutError):
                while follower.listener.next(max(0.01, deadline_s - time.monotonic())) is not None:
                    pass
                follower.member.ended(wait_s=max(0.01, deadline_s - time.monotonic()))
        self.end()

    def end(self) -> None:
        """Kill what still runs, and free what the group holds."""
        followers, self._followers = self._followers, []
        for follower in followers:
            follower.member.end()
            follower.member.link.close()
        self._release()

    def _await(self, follower: _Follower) -> FromFollower:
        # Loading takes as long as it takes; a rank that dies meanwhile closes its end.
        data = follower.listener.next(None)
        if data is None:
            error = EngineError(f"{follower.member.name} is gone")
            raise self.failure(error) from error
        message = decode_from_follower(data)
        if isinstance(message, Failure):
            raise _as_raised(message, follower.member.rank)
        return message


class GroupRunner:
    """Rank 0's runner, which has the other ranks run what it runs.

    Args:
        runner: of this rank.
        group: the others.
        slots_max: most slots of a plan.
    """

    def __init__(self, runner: Runner, group: RankGroup, *, slots_max: int) -> None:
        self._runner = runner
        self._group = group
        self._last_token_X = np.zeros(slots_max, dtype=np.int32)

    def bind(
        self,
        slot: int,
        params: SamplingParams,
        *,
        seed: int,
        prompt_count: int,
        tokens: Int32Array | None,
        stop_token_ids: Int32Array,
        grammar: Grammar | None = None,
    ) -> None:
        """Give a slot to a request; see `Runner.bind`."""
        self._runner.bind(
            slot,
            params,
            seed=seed,
            prompt_count=prompt_count,
            tokens=tokens,
            stop_token_ids=stop_token_ids,
            grammar=grammar,
        )

    def launch(self, plan: StepPlan) -> "GroupStep":
        """Run a forward pass on all ranks.

        Raises:
            EngineError: a rank is gone, or takes no plan any more.
        """
        token_ids = plan.token_ids.copy()
        decodes = slice(plan.decode_count)
        token_ids[plan.query_starts[decodes]] = self._last_token_X[plan.row_slots[decodes]]
        self._group.send(Launch(encode_plan(replace(plan, token_ids=token_ids))))
        return GroupStep(self._runner.launch(plan), self._group, plan, self._last_token_X)

    def warm_up(self) -> None:
        """Warm up all ranks.

        Raises:
            EngineError: a rank failed.
        """
        self._runner.warm_up(self.launch)

    def start_profile(self, output_dir: Path | None, steps: int | None) -> Path:
        """Record this rank's forwards; see `Runner.start_profile`."""
        return self._runner.start_profile(output_dir, steps)

    def stop_profile(self) -> Path:
        """End the recording; see `Runner.stop_profile`."""
        return self._runner.stop_profile()

    def close(self) -> None:
        """End all ranks."""
        self._runner.close()
        self._group.stop()


class GroupStep:
    """A forward pass of all ranks."""

    def __init__(
        self, step: LaunchedStep, group: RankGroup, plan: StepPlan, last_token_X: Int32Array
    ) -> None:
        self._step = step
        self._group = group
        self._plan = plan
        self._last_token_X = last_token_X

    def result(self) -> StepResult:
        """The sampled tokens.

        Raises:
            EngineError: a rank died or does not answer.
        """
        try:
            result = self._step.result()
        except EngineError as error:
            raise self._group.failure(error) from error
        lasts = Samples.of(self._plan).lasts(result.tokens)
        slots = self._plan.row_slots[self._plan.sample_rows[lasts]]
        self._last_token_X[slots] = result.tokens[lasts]
        return result


def _last_words(follower: _Follower, deadline_s: float) -> Failure | None:
    """What a rank said before it ended; None where it said nothing. Raises TimeoutError where it
    does neither in time."""
    while True:
        data = follower.listener.next(max(0.01, deadline_s - time.monotonic()))
        if data is None:
            return None
        message = decode_from_follower(data)
        if isinstance(message, Failure):
            return message


def _check_same(
    name: str, config: EngineConfig, opened: OpenedModel, model: str, theirs: Opened
) -> None:
    for flag in _SAME_FLAGS:
        own, other = getattr(config, flag), getattr(theirs.config, flag)
        if own != other:
            raise ConfigError(
                f"{name} was started with another {flag}: {other}, where rank 0 has {own}. Give "
                f"all ranks the same --{flag.replace('_', '-')}."
            )
    if theirs.dtype != opened.dtype_name:
        raise ConfigError(
            f"{name} computes in {theirs.dtype}, rank 0 in {opened.dtype_name}: give all ranks the "
            "same --dtype, which every host has"
        )
    if theirs.model != model:
        raise ConfigError(
            f"{name} opened another model as {theirs.config.model!r} than rank 0 as "
            f"{config.model!r}: their files differ. Give all ranks the same MODEL, and all hosts "
            "the same files."
        )


def _as_raised(failure: Failure, rank: int) -> TokenSpeedError:
    kind = getattr(errors, failure.kind, EngineError)
    if not (isinstance(kind, type) and issubclass(kind, TokenSpeedError)):
        kind = EngineError
    return kind(f"rank {rank}: {failure.message}")
