"""The runner: a plan in, one forward pass, sampled tokens out.

Legend: T tokens, R rows, S sampled rows, X slots, D decode rows, V vocabulary.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.samples import Samples
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import Int32Array, StepPlan, StepResult
from tokenspeed.execution.buffers import PageTable
from tokenspeed.execution.captured import Capture, CapturedSteps, CudaCapture
from tokenspeed.execution.confinement import Confinement
from tokenspeed.execution.cpu_sampler import CpuSampler
from tokenspeed.execution.cuts import CutPlan, drafts
from tokenspeed.execution.draft_model import draft_model_of
from tokenspeed.execution.draft_passes import Drafting
from tokenspeed.execution.forward import StepForward
from tokenspeed.execution.graph import StepGraph
from tokenspeed.execution.launched import AwaitedTokens, Launched, LaunchedStep
from tokenspeed.execution.platform import set_threads
from tokenspeed.execution.profile import ForwardProfiler
from tokenspeed.execution.report import joined
from tokenspeed.execution.sampler import Sampler
from tokenspeed.execution.warm_up import WARM_UP_PARAMS, warm_up_plans
from tokenspeed.grammar import Grammar
from tokenspeed.kernels.rows import ContextShare
from tokenspeed.modeling import Head, Model

__all__ = ["LaunchedStep", "Runner"]

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Binding:
    """A request that takes a slot with the next launch."""

    slot: int
    params: SamplingParams
    seed: int
    prompt_count: int
    tokens: Int32Array | None
    stop_token_ids: Int32Array
    grammar: Grammar | None


class Runner:
    """Runs plans in the order of their launch, and holds the last sampled token of every slot.

    With an overlap depth of 0 a launch runs the forward and returns after it; above that a thread
    of its own runs it, while the caller plans the next step.

    Args:
        model: loaded, on `device`.
        pools: the KV storage that plans name pages of.
        config: the greatest sizes of a plan, and the overlap depth.
        device: where the model runs.
        threads: CPU threads of the forward, set for the whole process; None for all it may use.
        share: which positions of a context the pools hold, where ranks share one; they are padded
            then. None for all.
        capture: what records launches on a GPU, into pools that are padded; CUDA graphs if None.
        drafting: a model that proposes drafts, where there is one.
    """

    def __init__(
        self,
        model: Model,
        pools: KVPools,
        config: SchedulerConfig,
        *,
        device: torch.device,
        threads: int | None,
        share: ContextShare | None = None,
        capture: Capture | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        self._model = model
        self._pools = pools
        self._config = config
        set_threads(threads)
        sizes = {"slots_max": config.slots_max, "vocabulary": model.config.vocab_size}
        kind = CpuSampler if CpuSampler.fits(model.kernels) else Sampler
        self._sampler = kind(**sizes, kernels=model.kernels)
        self._confinement = Confinement(**sizes, gates=self._sampler)
        capture = CudaCapture() if capture is None and device.type == "cuda" else capture
        self._tables = [
            PageTable(
                slots_max=config.slots_max + (capture is not None),
                pages_max=-(-config.context_max // config.page_size),
                device=device,
            )
            for _ in pools.pools
        ]
        head = drafting.model if drafting is not None else None
        self._state_layers = head.state_layers if isinstance(head, Head) else ()
        self._steps = StepForward(
            model,
            pools,
            config,
            tables=self._tables,
            device=device,
            capture=capture,
            share=share,
            state_layers=self._state_layers,
        )
        self._drafting = drafting
        self._draft_model = draft_model_of(
            drafting,
            config,
            vocabulary=model.config.vocab_size,
            tables=self._tables,
            device=device,
            capture=capture,
        )
        self._bindings: list[_Binding] = []
        self._profiler = ForwardProfiler()
        self._thread = (
            ThreadPoolExecutor(1, "forward", initializer=set_threads, initargs=(threads,))
            if config.overlap_depth
            else None
        )

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
        """Give a slot to a request, from the next launch on.

        Args:
            slot: one of the next plan's `bound_slots`.
            params: how the request's tokens are sampled.
            seed: 64-bit seed of its draws.
            prompt_count: tokens of its prompt.
            tokens: prompt and output so far, where penalties, a grammar or a draft model read them.
            stop_token_ids: tokens that end it, the model's own among them.
            grammar: what its output must follow.
        """
        # A launched step may still sample for the slot's last owner.
        self._bindings.append(
            _Binding(slot, params, seed, prompt_count, tokens, stop_token_ids, grammar)
        )

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Begin a forward pass; the plan's arrays must not change until its result is there."""
        bindings, self._bindings = self._bindings, []
        if self._thread is not None:
            return LaunchedStep(self._thread.submit(self._run, plan, bindings))
        try:
            return LaunchedStep(self._run(plan, bindings))
        except Exception as error:
            # It surfaces where the result is asked for, as it does with a thread.
            return LaunchedStep(error)

    def warm_up(self, launch: Callable[[StepPlan], Launched] | None = None) -> None:
        """Record the forward where the device is a CPU, then run a tiny prefill and a decode: the
        first request finds everything ready.

        To be called before any other plan: it writes to the pools' first page.

        Args:
            launch: what runs plans, where that is more than this runner; its own if None.
        """
        self.bind(
            0,
            WARM_UP_PARAMS,
            seed=0,
            prompt_count=1,
            tokens=np.zeros(1, dtype=np.int32),
            stop_token_ids=np.zeros(0, dtype=np.int32),
        )
        self.record()
        if self._draft_model is not None:
            self._draft_model.record()
        for plan in warm_up_plans(self._config, groups=len(self._tables)):
            (launch or self.launch)(plan).result()

    def record(self) -> None:
        """Record the forward, where it can be; of several ranks each does so for itself."""
        self._steps.record()

    def start_profile(self, output_dir: Path | None, steps: int | None) -> Path:
        """Record forwards to a trace, and return where it will be; see `ForwardProfiler.start`.

        Raises:
            RequestError: a trace is being recorded, or an argument is wrong.
        """
        return self._submit(self._profiler.start, output_dir, steps).result()

    def stop_profile(self) -> Path:
        """Write the trace and return where it is.

        Raises:
            RequestError: none was started, or it cannot be written.
        """
        return self._submit(self._profiler.stop).result()

    def close(self) -> None:
        """Wait for what was launched, and end the runner's thread."""
        self._submit(self._profiler.close).result()
        self._confinement.close()
        if self._thread is not None:
            self._thread.shutdown()

    def _submit(
        self, call: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
    ) -> Future[Result]:
        if self._thread is not None:
            return self._thread.submit(call, *args, **kwargs)
        future: Future[Result] = Future()
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def _run(self, plan: StepPlan, bindings: list[_Binding]) -> StepResult | AwaitedTokens:
        for binding in bindings:
            self._sampler.bind(
                binding.slot,
                binding.params,
                seed=binding.seed,
                prompt_count=binding.prompt_count,
                tokens=binding.tokens,
                stop_token_ids=binding.stop_token_ids,
            )
            self._confine(binding)
            if self._draft_model is not None:
                self._draft_model.bind(binding.slot, binding.tokens)
        self._move(plan)
        if not len(plan.row_slots):
            for table, group in zip(self._tables, plan.groups, strict=True):
                table.apply(group)
            return StepResult(tokens=np.zeros(0, dtype=np.int32), logprobs=None)
        # Ranks that follow have the whole plan already.
        whole = self._model.ranks > 1 or not plan.has_drafts
        cut = None if whole else CutPlan.of(plan, self._confinement.taken)
        result = self._compute_and_propose(plan if cut is None else cut.plan)
        self._profiler.stepped()
        if cut is None:
            return result
        assert isinstance(result, StepResult), "what a grammar confines is chosen on the host"
        return cut.whole(result)

    def _compute_and_propose(self, plan: StepPlan) -> StepResult | AwaitedTokens:
        result = self._compute(plan)
        if self._draft_model is None or not len(plan.propose_counts):
            return result
        # What follows of tokens can only be proposed once they are there.
        if isinstance(result, AwaitedTokens):
            result = result.result()
        states_TF = self._steps.states(len(plan.token_ids)) if self._state_layers else None
        proposals = self._draft_model.follow(plan, result.tokens, states_TF)
        return replace(
            result,
            proposed_starts=proposals.starts,
            proposed_tokens=proposals.tokens,
            proposed_chances=proposals.chances,
            caught_up_tokens=proposals.caught_up,
        )

    def _compute(self, plan: StepPlan) -> StepResult | AwaitedTokens:
        samples = Samples.of(plan) if plan.has_drafts else None
        for slot, guesses in drafts(plan) if samples else ():
            if not self._sampler.one_by_one(np.array([slot]))[0]:
                self._confinement.foresee(slot, guesses)
        graph = self._steps.recorded
        if graph is None or self._profiler.recording or not graph.serves(plan):
            return self._forward(plan)
        if (
            isinstance(graph, StepGraph)
            and isinstance(self._sampler, CpuSampler)
            and (samples is None or not self._waiting(samples, plan).any())
        ):
            chosen, logprobs = graph.sample(plan, self._sampler)
            if self._confinement.idle:
                return StepResult(tokens=chosen, logprobs=logprobs)
            counting_S = slice(None) if samples is None else samples.counting(chosen)
            slots_S = plan.row_slots[plan.sample_rows][counting_S]
            _, failures = self._confinement.advance(slots_S, chosen[counting_S])
            return StepResult(tokens=chosen, logprobs=logprobs, failures=failures)
        slots_S = plan.row_slots[plan.sample_rows]
        free = self._confinement.free(slots_S)
        likeliest = free and self._sampler.takes_likeliest(slots_S)
        tokens: AwaitedTokens | Int32Array | None = None
        if free and not likeliest and isinstance(graph, CapturedSteps):
            tokens = graph.draw(plan, self._sampler)
        if tokens is None:
            logits_SV, tokens = graph.run(plan, likeliest=likeliest)
            if not likeliest or tokens is None:
                return self._sample(plan, logits_SV)
        if isinstance(tokens, AwaitedTokens):
            return tokens
        return StepResult(tokens=tokens, logprobs=None)

    def _move(self, plan: StepPlan) -> None:
        if all(group.stays for group in plan.groups):
            return
        pools = [*zip(self._pools.pools, plan.groups, strict=True)]
        if (drafting := self._drafting) is not None and drafting.groups:
            groups = [plan.groups[index] for index in drafting.groups]
            pools += zip(drafting.pools.pools, groups, strict=True)
        # What leaves the device is copied before anything is written to where it was.
        for pool, group in pools:
            if len(group.stores.sources):
                pool.store(group.stores.sources, group.stores.targets)
            if len(group.loads.pages):
                pool.load(group.loads.elsewhere, group.loads.pages)

    @torch.inference_mode()
    def follow(self, plan: StepPlan) -> None:
        """Compute this rank's part of a plan that rank 0 samples.

        Args:
            plan: one in which the tokens of decode rows stand in `token_ids`.
        """
        self._move(plan)
        decode_slots = plan.row_slots[: plan.decode_count]
        last_tokens = plan.token_ids[plan.query_starts[: plan.decode_count]]
        self._steps.set_last_tokens(decode_slots, last_tokens)
        self._steps.compute(plan)

    @torch.inference_mode()
    def _forward(self, plan: StepPlan) -> StepResult:
        return self._sample(plan, self._steps.logits(plan))

    @torch.inference_mode()
    def _sample(self, plan: StepPlan, logits_SV: torch.Tensor) -> StepResult:
        samples = Samples.of(plan)
        slots_S = plan.row_slots[plan.sample_rows]
        waiting_S = self._waiting(samples, plan)
        tokens_S = np.zeros(len(slots_S), dtype=np.int32)
        failures: dict[int, str] = {}
        logprobs = []
        wave = np.flatnonzero(~waiting_S)
        while len(wave):
            # Bitmasks were made while the forward ran, or since the wave before.
            found, of_wave = self._sampler.sample(
                _rows(logits_SV, wave), slots_S[wave], plan.sample_positions[wave]
            )
            tokens_S[wave] = found.cpu().numpy()
            if of_wave is not None:
                logprobs.append((wave, of_wave))
            wave = wave[samples.counting(tokens_S)[wave]]
            going_on, failed = self._confinement.advance(slots_S[wave], tokens_S[wave])
            failures |= failed
            wave = samples.following(wave[going_on], tokens_S)
            wave = wave[waiting_S[wave]]
        lasts = samples.lasts(tokens_S)
        self._steps.set_last_tokens(slots_S[lasts], tokens_S[lasts])
        return StepResult(tokens=tokens_S, logprobs=joined(logprobs), failures=failures)

    def _waiting(self, samples: Samples, plan: StepPlan) -> npt.NDArray[np.bool_]:
        """What a request with a history may say next hangs on more than logits: behind a guess it
        is sampled once the guess has been found right."""
        one_by_one_S = self._sampler.one_by_one(plan.row_slots[plan.sample_rows])
        waiting_S: npt.NDArray[np.bool_] = samples.later_S & one_by_one_S
        return waiting_S

    def _confine(self, binding: _Binding) -> None:
        output: list[int] = []
        if binding.grammar is not None:
            assert binding.tokens is not None, "a request with a grammar comes with its tokens"
            output = binding.tokens[binding.prompt_count :].tolist()
        self._confinement.bind(
            binding.slot,
            binding.grammar,
            output=output,
            ends=binding.stop_token_ids,
            ignore_eos=binding.params.ignore_eos,
        )


def _rows(logits_SV: torch.Tensor, samples: npt.NDArray[np.intp]) -> torch.Tensor:
    """The logits of ascending samples, in place where they lie together."""
    first, end = int(samples[0]), int(samples[-1]) + 1
    if end - first == len(samples):
        return logits_SV[first:end]
    return logits_SV[torch.from_numpy(samples).to(logits_SV.device)]
