"""Rank 0's side of an engine of several ranks: starts the others, and has them run every plan.

The control plane lives on rank 0, which alone samples. Each step goes to the others once, as bytes;
what ranks exchange within a step is the model's. A rank that dies or hangs ends the group: whoever
waits for it in a collective gives up after some seconds, and rank 0 says which rank it was.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from tokenspeed.core import errors
from tokenspeed.core.config import EngineConfig, SchedulerConfig
from tokenspeed.core.errors import EngineError, TokenSpeedError
from tokenspeed.core.samples import Samples
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import Int32Array, StepPlan, StepResult
from tokenspeed.distributed import Mesh
from tokenspeed.engine.rank_wire import (
    Failure,
    FromFollower,
    Launch,
    Loaded,
    Opened,
    Setup,
    Stop,
    ToFollower,
    encode_plan,
    receive,
    send,
)
from tokenspeed.execution import Runner
from tokenspeed.execution.runner import LaunchedStep
from tokenspeed.grammar import Grammar

__all__ = ["GroupRunner", "RankGroup"]

SEND_TIMEOUT_S = 6.0
# How long a rank that is alive takes at most to say that a collective failed for it too.
LAST_WORDS_S = 1.5
STOP_TIMEOUT_S = 5.0


class _Follower:
    """One of the other processes."""

    def __init__(self, rank: int, config: EngineConfig, store: Path) -> None:
        self.rank = rank
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tokenspeed.engine.follower",
                    *("--rank", str(rank)),
                    *("--socket-fd", str(theirs.fileno())),
                    *("--store", str(store)),
                    *("--config-json", msgspec.json.encode(config).decode()),
                ],
                pass_fds=[theirs.fileno()],
            )

    def how_it_ended(self) -> str | None:
        """How the process ended; None while it lives."""
        code = self.process.poll()
        if code is None:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class RankGroup:
    """The ranks above 0 of one engine, as processes on this host.

    Args:
        config: the engine's; the others are started with it too.
        mesh: all ranks.

    Attributes:
        store_path: the file where ranks meet.
    """

    def __init__(self, config: EngineConfig, mesh: Mesh) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tokenspeed-ranks-")
        self.store_path = Path(self._folder.name) / "store"
        self._followers = [
            _Follower(rank, config, self.store_path) for rank in range(1, mesh.world)
        ]

    def set_up(self, config: SchedulerConfig) -> None:
        """Wait until every rank has found the model, then have all connect and load.

        Raises:
            TokenSpeedError: what one of them failed for.
        """
        self._await(Opened)
        self.send(Setup(config))

    def await_loaded(self) -> None:
        """Wait until every rank is ready for steps.

        Raises:
            TokenSpeedError: what one of them failed for.
        """
        self._await(Loaded)

    def send(self, message: ToFollower) -> None:
        """Send a message to every rank.

        Raises:
            EngineError: one of them is gone, or takes nothing any more.
        """
        for follower in self._followers:
            try:
                follower.socket.settimeout(SEND_TIMEOUT_S)
                send(follower.socket, message)
            except OSError as error:
                raise self.failure(error) from error

    def failure(self, cause: Exception) -> EngineError:
        """End all ranks; gives the error that says which of them failed, and how."""
        deadline_s = time.monotonic() + LAST_WORDS_S
        found: list[str] = []
        silent: list[str] = []
        for follower in self._followers:
            words = _last_words(follower, deadline_s)
            ended = follower.how_it_ended()
            name = f"rank {follower.rank} (process {follower.process.pid})"
            if ended is not None and words is None:
                found.append(f"{name} ended: {ended}")
            elif words is None:
                silent.append(f"{name} does not answer")
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
        for follower in self._followers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                follower.process.wait(STOP_TIMEOUT_S)
        self.end()

    def end(self) -> None:
        """Kill what still runs, and free what the group holds."""
        for follower in self._followers:
            if follower.process.poll() is None:
                follower.process.kill()
            follower.process.wait()
            follower.socket.close()
        self._followers = []
        self._folder.cleanup()

    def _await(self, wanted: type[Opened] | type[Loaded]) -> None:
        for follower in self._followers:
            # Loading takes as long as it takes; a rank that dies meanwhile closes its end.
            follower.socket.settimeout(None)
            try:
                message = _decoded(receive(follower.socket))
            except (EngineError, OSError) as error:
                raise self.failure(error) from error
            if isinstance(message, Failure):
                self.end()
                raise _as_raised(message, follower.rank)
            assert isinstance(message, wanted)


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
    """What a rank said before it ended, if it comes in time."""
    try:
        follower.socket.settimeout(max(0.01, deadline_s - time.monotonic()))
        message = _decoded(receive(follower.socket))
    except (EngineError, OSError):
        # It said nothing; if it closed its end, it is about to have ended.
        with contextlib.suppress(subprocess.TimeoutExpired):
            follower.process.wait(0.2)
        return None
    return message if isinstance(message, Failure) else None


def _decoded(data: bytes) -> FromFollower:
    message: FromFollower = msgspec.msgpack.decode(data, type=FromFollower)
    return message


def _as_raised(failure: Failure, rank: int) -> TokenSpeedError:
    kind = getattr(errors, failure.kind, EngineError)
    if not (isinstance(kind, type) and issubclass(kind, TokenSpeedError)):
        kind = EngineError
    return kind(f"rank {rank}: {failure.message}")
