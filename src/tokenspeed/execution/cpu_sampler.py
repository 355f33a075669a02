"""The sampler of native CPU kernels: all rows of a step in one call, which a recorded step makes.

What it does to a row, and in which order, is that of `tokenspeed.execution.sampler`.

Legend: S sampled rows, V vocabulary, X slots, W 32-bit words of V bits, L rows that report,
R rows of a step.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import Float32Array, Int32Array, SampledLogprobs
from tokenspeed.kernels import KernelSelector
from tokenspeed.kernels.cpu import CpuSampling
from tokenspeed.kernels.ops import sampling as ops

__all__ = ["CpuSampler", "Reports"]

_OPS = (ops.add_bias, ops.apply_bitmask, ops.argmax, ops.draw, ops.logprobs, ops.penalise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """Room for the log-probabilities of a step.

    Attributes:
        rows: [L] which of the step's samples report.
        counts: [L] how many of the likeliest tokens each wants.
        chosen: float32 [L].
        ids, values: [L * K], K the most that any wants.
    """

    rows: npt.NDArray[np.int64]
    counts: Int32Array
    chosen: Float32Array
    ids: Int32Array
    values: Float32Array

    def logprobs(self) -> SampledLogprobs | None:
        """What was written there; None where no row reports."""
        if not len(self.rows):
            return None
        return SampledLogprobs(
            sample_indices=self.rows.astype(np.int32),
            chosen=self.chosen,
            top_token_ids=self.ids.reshape(len(self.rows), -1),
            top_values=self.values.reshape(len(self.rows), -1),
            top_counts=self.counts,
        )


class CpuSampler:
    """Samples the rows of a step; holds the parameters of every slot.

    Args:
        slots_max: X.
        vocabulary: V, which every row of logits has.
        kernels: of a CPU.

    Attributes:
        native: what a recorded step has choose its tokens.
    """

    def __init__(self, *, slots_max: int, vocabulary: int, kernels: KernelSelector) -> None:
        self._vocabulary = vocabulary
        self._argmax = kernels.select(ops.argmax, format_name="float32")
        self.native = CpuSampling(kernels.runtime, slots_max=slots_max, vocabulary=vocabulary)
        self._top_logprobs_X = np.zeros(slots_max, dtype=np.int32)
        self._reports_X = np.zeros(slots_max, dtype=np.bool_)
        self._one_by_one_X = np.zeros(slots_max, dtype=np.bool_)
        # Slots of requests that want more than the likeliest token.
        self._others: set[int] = set()
        self._reporting: set[int] = set()
        # Read where they lie, so they must stay.
        self._bitmasks: dict[int, torch.Tensor | None] = {}
        self._no_reports = self._room(np.zeros(0, dtype=np.int32))

    @staticmethod
    def fits(kernels: KernelSelector) -> bool:
        """Whether every op of sampling is to be the native one."""
        winners = (kernels.explain(op.name, format_name="float32").winner for op in _OPS)
        return all(winner is not None and winner.solution == "cpu" for winner in winners)

    def bind(
        self,
        slot: int,
        params: SamplingParams,
        *,
        seed: int,
        prompt_count: int,
        tokens: Int32Array | None,
        stop_token_ids: Int32Array,
    ) -> None:
        """As `Sampler.bind`."""
        seen = None
        if params.needs_history:
            assert tokens is not None, "a request with penalties comes with its tokens"
            seen = (tokens[:prompt_count], tokens[prompt_count:])
        ends = stop_token_ids[stop_token_ids < self._vocabulary] if params.min_new_tokens else ()
        top_logprobs = min(params.logprobs or 0, self._vocabulary)
        self.native.bind(
            slot,
            temperature=params.temperature,
            top_k=min(params.top_k or self._vocabulary, self._vocabulary),
            top_p=params.top_p,
            min_p=params.min_p,
            seed=seed,
            min_new_tokens=params.min_new_tokens,
            logprobs=None if params.logprobs is None else top_logprobs,
            ends=list(map(int, ends)),
            bias_ids=list(params.logit_bias.keys()),
            bias_values=list(params.logit_bias.values()),
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            seen=seen,
        )
        self._reports_X[slot] = params.logprobs is not None
        self._one_by_one_X[slot] = params.needs_history or params.logprobs is not None
        self._others.discard(slot)
        if (
            params.temperature > 0.0
            or params.min_new_tokens
            or params.logit_bias
            or self._one_by_one_X[slot]
        ):
            self._others.add(slot)
        self._reporting.discard(slot)
        if params.logprobs is not None:
            self._reporting.add(slot)
        self._top_logprobs_X[slot] = top_logprobs

    def expect(self, slot: int) -> None:
        """As `Sampler.expect`."""
        self.native.expect(slot)

    def allow(self, slot: int, bitmasks: torch.Tensor | None) -> None:
        """As `Sampler.allow`."""
        if bitmasks is None or bitmasks.ndim == 1:
            self.native.allow(slot, bitmasks)
        else:
            self.native.allow(slot, bitmasks.view(-1), len(bitmasks))
        self._bitmasks[slot] = bitmasks

    def takes_likeliest(self, slots_S: Int32Array) -> bool:
        """Whether `sample` without a bitmask is the likeliest token of each row, and no more."""
        return self._others.isdisjoint(slots_S.tolist())

    def one_by_one(self, slots_S: Int32Array) -> npt.NDArray[np.bool_]:
        """As `Sampler.one_by_one`."""
        return self._one_by_one_X[slots_S]

    def reports(self, slots_R: Int32Array, sample_rows: Int32Array | None = None) -> Reports:
        """Room for what samples of a step report: of these rows [S], or of each where None."""
        if not self._reporting:
            return self._no_reports
        return self._room(slots_R if sample_rows is None else slots_R[sample_rows])

    def _room(self, slots_S: Int32Array) -> Reports:
        rows = np.flatnonzero(self._reports_X[slots_S])
        counts = self._top_logprobs_X[slots_S[rows]]
        entries = len(rows) * int(counts.max(initial=0))
        return Reports(
            rows=rows,
            counts=counts,
            chosen=np.empty(len(rows), dtype=np.float32),
            ids=np.zeros(entries, dtype=np.int32),
            values=np.zeros(entries, dtype=np.float32),
        )

    def sample(
        self, logits_SV: torch.Tensor, slots_S: Int32Array, positions_S: Int32Array
    ) -> tuple[torch.Tensor, SampledLogprobs | None]:
        """As `Sampler.sample`, which a recorded step does by itself."""
        tokens_S = self._argmax(logits_SV)
        reports = self.reports(slots_S)
        self.native.sample(
            logits_SV,
            slots_S,
            positions_S,
            tokens_S,
            reports.chosen,
            reports.ids,
            reports.values,
        )
        return tokens_S, reports.logprobs()
