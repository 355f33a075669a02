"""The engine: requests in, one step after the other, tokens out."""

import secrets
import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from tokenspeed.control import Scheduler
from tokenspeed.core.errors import InvalidParameter, RequestError
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import (
    Int32Array,
    SampledLogprobs,
    StepOutcome,
    StepPlan,
    StepResult,
)
from tokenspeed.engine.facts import EngineInfo, StepTiming
from tokenspeed.engine.ledger import Launched as BookedStep
from tokenspeed.engine.ledger import Ledger, StepClock
from tokenspeed.engine.wire import Refused, StepOutputs, Submit
from tokenspeed.grammar import ConstraintCompiler, Grammar, Refusal

__all__ = ["Engine", "EngineCore", "LaunchedStep", "StepRunner", "step_timing"]

_CLOCK_FIELDS = [name for name in StepClock.__slots__ if not name.startswith("_")]


class LaunchedStep(Protocol):
    """A forward pass under way."""

    def result(self) -> StepResult:
        """Wait for the sampled tokens; raises what the forward raised."""


class StepRunner(Protocol):
    """The execution plane as the engine sees it."""

    def bind(
        self,
        slot: int,
        params: SamplingParams,
        *,
        seed: int,
        prompt_count: int,
        tokens: Int32Array | None,
        stop_token_ids: Int32Array,
        grammar: Grammar | None,
    ) -> None:
        """Give a slot to a request."""

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Begin a forward pass."""

    def start_profile(self, output_dir: Path | None, steps: int | None) -> Path:
        """Record the following forward passes; the path of the trace to be."""

    def stop_profile(self) -> Path:
        """End the recording and write the trace; its path."""

    def close(self) -> None:
        """Free what the runner holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Live:
    """What the execution plane must be told when the request takes a slot."""

    params: SamplingParams
    seed: int
    prompt_count: int
    stop_token_ids: Int32Array
    grammar: Grammar | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFlight:
    """A launched step, and whose the slots with a grammar are in it."""

    plan: StepPlan
    launched: LaunchedStep
    confined: dict[int, int]
    booked: BookedStep


class EngineCore:
    """The step loop over a control plane that decides and a runner that obeys.

    Args:
        control: the control plane.
        runner: the execution plane.
        eos_token_ids: the model's own end-of-text tokens.
        constraints: compiles what answers must follow; None to refuse such requests.
        overlap_depth: steps launched ahead of the oldest uncommitted one.
        seed: base of the seeds of requests that bring none; None draws each afresh.

    Attributes:
        ledger: where the time of each request goes.
        clock: where the time of steps goes.
    """

    def __init__(
        self,
        control: Scheduler,
        runner: StepRunner,
        *,
        eos_token_ids: tuple[int, ...],
        overlap_depth: int,
        seed: int | None,
        constraints: ConstraintCompiler | None = None,
    ) -> None:
        self.control = control
        self.runner = runner
        self.ledger = Ledger(control.interval_bound_us)
        self.clock = StepClock()
        self._eos_token_ids = eos_token_ids
        self._overlap_depth = overlap_depth
        self._seeds = None if seed is None else np.random.Generator(np.random.Philox(seed))
        self._live: dict[int, _Live] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._constraints = constraints
        # Requests whose grammar is being compiled; the control plane does not know them yet.
        self._compiling: dict[int, Submit] = {}
        self._confined: dict[int, int] = {}
        self._refused: list[Refused] = []

    @property
    def busy(self) -> bool:
        """Whether a step would have something to do."""
        return bool(self._live or self._in_flight or self._refused)

    @property
    def idle(self) -> bool:
        """Whether no request is still to reach its end."""
        return not (self.busy or self._compiling)

    @property
    def live(self) -> int:
        """Requests that have not ended, those that wait for their turn among them."""
        return len(self._live) + len(self._compiling)

    @property
    def wake_descriptor(self) -> int | None:
        """Readable when there is something to do though the engine is not `busy`."""
        return None if self._constraints is None else self._constraints.descriptor

    def wait(self, timeout_s: float) -> None:
        """With requests that wait for their grammars, and no others: wait for the first."""
        if not self.busy and self._constraints is not None:
            select.select([self._constraints.descriptor], [], [], timeout_s)

    def submit(self, message: Submit) -> None:
        """Queue a request, behind the compilation of what its answer must follow.

        Raises:
            RequestError: it can not be taken. What is found wrong later is in `take_refused`.
        """
        wanted = message.params.structured_outputs
        if wanted is None:
            self._admit(message, None)
            self._open_account(message)
            return
        if self._constraints is None:
            raise InvalidParameter("this engine enforces no constraints; leave them out")
        self._constraints.submit(message.request, wanted)
        self._compiling[message.request] = message
        self._open_account(message)

    def _admit(self, message: Submit, grammar: Grammar | None) -> None:
        params = message.params
        confined = grammar is not None
        # A text that has come to its end ends, whatever else was asked for: the sampler keeps ends
        # away as long as the grammar lets it, so that one which is sampled is meant.
        eos = () if params.ignore_eos and not confined else self._eos_token_ids
        stop_token_ids = np.array(sorted({*eos, *params.stop_token_ids}), dtype=np.int32)
        prompt = np.frombuffer(message.prompt, dtype=np.int32)
        self.control.submit(
            message.request,
            prompt,
            max_new_tokens=message.max_new_tokens,
            min_new_tokens=0 if confined else params.min_new_tokens,
            stop_token_ids=stop_token_ids,
            salt=message.salt,
            priority=message.priority,
            tenant=message.salt if message.tenant is None else message.tenant,
        )
        seed = message.seed if message.seed is not None else self._fresh_seed()
        self._live[message.request] = _Live(
            params=params,
            seed=seed,
            prompt_count=len(prompt),
            stop_token_ids=stop_token_ids,
            grammar=grammar,
        )

    def abort(self, request: int) -> None:
        """End a request; unknown ones are ignored."""
        if self._compiling.pop(request, None) is not None:
            assert self._constraints is not None
            self._constraints.cancel(request)
            self.ledger.drop(request)
            self._refuse(request, RequestError("the request was ended before it began"))
            return
        self.control.abort(request)

    def take_refused(self) -> list[Refused]:
        """Requests that ended with an error since the last call; whatever a step gives for one of
        them afterwards belongs to nobody."""
        refused, self._refused = self._refused, []
        return refused

    def step(self) -> StepOutputs | None:
        """Plan, launch, commit once. None when nothing came of it."""
        self.clock.begin(_now_us())
        # An engine with nothing else to do was woken, and must take what woke it.
        if self._constraints is not None and (self._compiling or not self.busy):
            self._admit_compiled(self._constraints)
        plan = self.control.plan(_now_us())
        planned_us = self.clock.lap("plan_us", _now_us())
        if plan is not None:
            self._launch(plan, planned_us)
        logprobs = None
        if self._in_flight and (plan is None or len(self._in_flight) > self._overlap_depth):
            logprobs = self._retire(self._in_flight.popleft())
        outputs = self._outputs(self.control.take_outcome(), logprobs)
        self.clock.end(self.clock.lap("outputs_us", _now_us()), busy=self.busy)
        return outputs

    def _launch(self, plan: StepPlan, now_us: int) -> None:
        booked = self.ledger.launched(plan, now_us)
        self._bind(plan)
        launched = self.runner.launch(plan)
        self._in_flight.append(
            _InFlight(plan=plan, launched=launched, confined=self._confined.copy(), booked=booked)
        )
        self.clock.lap("launch_us", _now_us())

    def _retire(self, done: _InFlight) -> SampledLogprobs | None:
        """Wait for a step and commit it."""
        result = done.launched.result()
        done_us = self.clock.lap("forward_us", _now_us())
        self.control.commit(done.plan.step, result.tokens, done_us, result=result)
        for transfer in done.plan.transfers.ids.tolist():
            # The runner does them in the step that begins them.
            self.control.transferred(transfer, complete=True)
        for slot, reason in result.failures.items():
            self._fail(done.confined[slot], reason)
        self.ledger.retired(done.booked, done_us, result.tokens, result.cuts)
        self.clock.book(done.plan, done_us - done.booked.began_us)
        self.clock.lap("commit_us", _now_us())
        return result.logprobs

    def close(self) -> None:
        """Free the runner, and end what compiles constraints."""
        self.runner.close()
        if self._constraints is not None:
            self._constraints.close()

    def _admit_compiled(self, constraints: ConstraintCompiler) -> None:
        """Queue requests whose grammars have come; refuse those that get none."""
        for compiled in constraints.take():
            message = self._compiling.pop(compiled.request)
            if isinstance(compiled.outcome, Refusal):
                self.ledger.drop(compiled.request)
                self._refuse(compiled.request, compiled.outcome.error())
                continue
            try:
                self._admit(message, compiled.outcome)
                self.ledger.queue(compiled.request, _now_us())
            except RequestError as error:
                self.ledger.drop(compiled.request)
                self._refuse(compiled.request, error)

    def _open_account(self, message: Submit) -> None:
        self.ledger.open(
            message.request,
            prompt_count=len(message.prompt) // 4,
            at_us=_now_us() if message.sent_us is None else message.sent_us,
            constrained=message.request in self._compiling,
        )

    def _refuse(self, request: int, error: RequestError) -> None:
        self._refused.append(Refused(request, type(error).__name__, str(error)))

    def _fail(self, request: int, reason: str) -> None:
        """End a request that has begun with an error."""
        if request in self._live:
            self._refuse(
                request,
                InvalidParameter(f"the constraint could not be followed any further: {reason}"),
            )
            self.control.abort(request)

    def _fresh_seed(self) -> int:
        if self._seeds is None:
            return secrets.randbits(64)
        return int(self._seeds.integers(0, 2**64, dtype=np.uint64))

    def _bind(self, plan: StepPlan) -> None:
        for slot, request in zip(
            plan.bound_slots.tolist(), plan.bound_requests.tolist(), strict=True
        ):
            live = self._live[request]
            confined = live.grammar is not None
            if confined:
                self._confined[slot] = request
            else:
                self._confined.pop(slot, None)
            needs_tokens = confined or live.params.needs_history or self.control.proposal_window > 0
            self.runner.bind(
                slot,
                live.params,
                seed=live.seed,
                prompt_count=live.prompt_count,
                tokens=self.control.tokens(request) if needs_tokens else None,
                stop_token_ids=live.stop_token_ids,
                grammar=live.grammar,
            )

    def _outputs(
        self, outcome: StepOutcome, logprobs: SampledLogprobs | None
    ) -> StepOutputs | None:
        if not (len(outcome.requests) or len(outcome.finished) or len(outcome.admitted)):
            return None
        finished = outcome.finished.tolist()
        for request in finished:
            del self._live[request]
        return StepOutputs.of(
            outcome,
            times=self.ledger.close(finished, _now_us()) if finished else None,
            drafts=self.ledger.take_drafts(),
            logprobs=logprobs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine that is ready to step, and what clients may know of it.

    Attributes:
        core, info: both.
        learning: steps that teach what drafts cost on this machine, each made as it is asked for:
            as many as there is time for before the first request, and none after it.
        check: to be called now and then while nothing is to do; raises EngineError where the
            engine could do nothing any more. None where there is nothing to check.
    """

    core: EngineCore
    info: EngineInfo
    learning: Iterator[None] = field(default_factory=lambda: iter(()))
    check: Callable[[], None] | None = None


def step_timing(core: EngineCore) -> StepTiming:
    """Where an engine's time went, and how evenly its tokens came."""
    clock, ledger = core.clock, core.ledger
    return StepTiming(
        **{name: getattr(clock, name) for name in _CLOCK_FIELDS},
        intervals=ledger.intervals.tolist(),
        intervals_us=ledger.intervals_us,
        floor_violations=ledger.floor_violations,
    )


def _now_us() -> int:
    return time.monotonic_ns() // 1000
