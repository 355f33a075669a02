"""Step graphs on CPUs: a step's kernel calls, recorded once and run again without Python.

What ranks exchange is called from between them, which is all that Python does then.

Legend: T tokens, R rows, S sampled rows, X slots, P pages of a slot, V vocabulary.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.step import Float32Array, Int32Array, SampledLogprobs, StepPlan
from tokenspeed.execution.cpu_sampler import CpuSampler
from tokenspeed.execution.step_memory import StepMemory, TrialMemory
from tokenspeed.kernels import ops
from tokenspeed.kernels.cpu import CpuRuntime, CpuSampling, StepRecording, aside
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.modeling import ForwardBatch, HiddenStates, Model

__all__ = ["StepGraph"]

_Sampling = tuple[CpuSampling, Int32Array, Float32Array, Int32Array, Float32Array]

_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    {_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default}
)
_VIEWS = frozenset(
    {
        _aten.alias.default,
        _aten.detach.default,
        _aten.expand.default,
        _aten.permute.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        _aten.squeeze.dim,
        _aten.t.default,
        _aten.transpose.int,
        _aten.unflatten.int,
        _aten.unsqueeze.default,
        _aten.view.default,
        _aten._unsafe_view.default,
    }
)


class _NotRecordable(Exception):
    """PyTorch was to compute something, which a recording of kernels would leave out."""


class _Keeper(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes tensors in given memory, and lets nothing but views pass."""

    def __init__(self, memory: StepMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Asked to leave this mode alone, torch would load its compiler first: a second or two, and
        # memory, for something that nothing here ever calls.
        return False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _VIEWS:
            return func(*args, **(kwargs or {}))
        if func not in _ALLOCATIONS:
            raise _NotRecordable(str(func))
        like = func(*args, **{**(kwargs or {}), "device": "meta"})
        return self._memory.tensor(like.shape, like.dtype)


def _borrowed(x: torch.Tensor) -> torch.Tensor:
    """The same memory, which may go to other tensors meanwhile: of what is kept for later, x is
    what it is when its turn comes."""
    memory = (ctypes.c_byte * x.nbytes).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape)


def _keep(
    runtime: CpuRuntime,
    x: torch.Tensor,
    made: torch.Tensor,
    exchange: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Record an exchange of ranks: `made`, as far as a step has rows, from what x has then."""
    if not x.is_contiguous():
        raise _NotRecordable("an exchange of rows that lie apart")
    source, target = _borrowed(x), _borrowed(made)

    def call(rows: int) -> None:
        target[:rows].copy_(exchange(source[:rows]))

    aside(runtime, x, made, call)


class StepGraph:
    """The forward of any step, decode rows and prefill chunks together, and the likeliest tokens.

    Its memory is that of a step with the most tokens.

    Attributes:
        states: hidden states of the last run, where they were asked for.
    """

    def __init__(
        self,
        *,
        recording: StepRecording,
        logits_SV: torch.Tensor,
        states: HiddenStates | None,
        kept: Sequence[object],
    ) -> None:
        self.states = states
        self._recording = recording
        self._logits_SV = logits_SV
        self._kept = kept

    @classmethod
    def record(
        cls,
        model: Model,
        pools: KVPools,
        config: SchedulerConfig,
        *,
        tables: Sequence[torch.Tensor],
        last_token_X: torch.Tensor,
        state_layers: Sequence[int] = (),
    ) -> "StepGraph | None":
        """Record a model's forward; None where a part of it is not a native CPU kernel, or a kernel
        works on something else than the step's tokens, rows or samples.

        Nothing is computed, or exchanged, meanwhile.

        Args:
            model: loaded.
            pools: the KV storage that plans name pages of.
            config: gives the greatest numbers of tokens, rows and drafted tokens, and the page
                size.
            tables: int32 [X, P] of each cache group, which runs keep up to date.
            last_token_X: int64, the last token of each slot, likewise.
            state_layers: of `HiddenStates`, which are kept in `states` then.
        """
        exchanges = model.exchanges
        if model.ranks > 1 and exchanges is None:
            return None
        # By its number of rows a recorded kernel is known to work on tokens, on rows or on samples,
        # so these must differ.
        rows_max = config.slots_max
        samples_max = rows_max + config.step_drafts_max + 1
        tokens_max = max(config.step_tokens_max, samples_max + 1)
        token_ids_T = torch.zeros(tokens_max, dtype=torch.int64)
        positions_T = torch.zeros(tokens_max, dtype=torch.int64)
        sampled_S = torch.zeros(samples_max, dtype=torch.int64)
        query_starts = np.full(rows_max + 1, tokens_max, dtype=np.int32)
        query_starts[0] = 0
        context_lens_R = np.zeros(rows_max, dtype=np.int32)
        row_slots_R = np.zeros(rows_max, dtype=np.int32)
        groups = tuple(
            PagedRows(
                query_starts=query_starts,
                context_lens=context_lens_R,
                row_slots=row_slots_R,
                page_table_XP=table_XP,
                kv_slots_T=torch.zeros(tokens_max, dtype=torch.int64),
                page_size=config.page_size,
            )
            for table_XP in tables
        )
        states = HiddenStates(state_layers) if state_layers else None
        batch = ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            groups=groups,
            sample_token_indices_S=sampled_S,
            kept=states,
        )
        argmax = model.kernels.select(ops.sampling.argmax, format_name="float32")
        recording = StepRecording(
            model.kernels.runtime,
            token_ids_T,
            positions_T,
            query_starts,
            context_lens_R,
            row_slots_R,
            sampled_S,
            last_token_X,
            [(group.kv_slots_T, group.page_table_XP) for group in groups],
        )
        # Zeros that no file has, of biases that another rank adds, are made with their first use.
        for _, weight in model.weights():
            _ = weight.data

        def trace(memory: StepMemory) -> tuple[torch.Tensor, torch.Tensor] | None:
            """Logits and likeliest tokens of the forward, of which only calls are kept."""
            recordable = False
            logits_SV, chosen_S = torch.empty(0, 0), last_token_X
            recording.begin(memory.use)
            if exchanges is not None:
                exchanges.keep = functools.partial(_keep, model.kernels.runtime)
            try:
                with _Keeper(memory):
                    logits_SV = model.forward(batch, pools)
                    chosen_S = argmax(logits_SV)
            except _NotRecordable:
                return None
            finally:
                if exchanges is not None:
                    exchanges.keep = None
                recordable = recording.end(logits_SV, chosen_S)
            return (logits_SV, chosen_S) if recordable else None

        trial = TrialMemory()
        results = trace(trial)
        if results is None:
            return None
        # What is held now is what a step leaves.
        memory = trial.planned()
        results = trace(memory)
        assert results is not None, "what was recorded once can be recorded again"
        logits_SV, chosen_S = results
        return cls(
            recording=recording,
            logits_SV=logits_SV,
            states=states,
            kept=(model, pools, batch, last_token_X, chosen_S, memory),
        )

    def serves(self, plan: StepPlan) -> bool:
        """Any plan."""
        return True

    def sample(
        self, plan: StepPlan, sampler: CpuSampler
    ) -> tuple[Int32Array, SampledLogprobs | None]:
        """Compute a plan and choose its tokens, which are their slots' last from now on."""
        reports = sampler.reports(plan.row_slots, plan.sample_rows)
        sampling = (
            sampler.native,
            plan.sample_positions,
            reports.chosen,
            reports.ids,
            reports.values,
        )
        return self._run(plan, sampling), reports.logprobs()

    def run(self, plan: StepPlan, *, likeliest: bool = True) -> tuple[torch.Tensor, Int32Array]:
        """Compute a plan.

        Args:
            plan: what runs.
            likeliest: whether the likeliest tokens are wanted; they are chosen in any case.

        Returns:
            logits_SV in float32, valid until the next run, and the likeliest token of each sample.
            The last that counts of each row is its slot's last one from now on.
        """
        tokens = self._run(plan, None)
        return self._logits_SV[: len(tokens)], tokens

    def _run(self, plan: StepPlan, sampling: _Sampling | None) -> Int32Array:
        tokens = np.empty(len(plan.sample_rows), dtype=np.int32)
        self._recording.run(
            plan.decode_count,
            plan.row_slots,
            plan.query_starts,
            plan.context_lens,
            plan.token_ids,
            plan.sample_rows,
            [
                (group.kv_slots, group.table_slots, group.table_indices, group.table_pages)
                for group in plan.groups
            ],
            tokens,
            sampling,
        )
        return tokens
