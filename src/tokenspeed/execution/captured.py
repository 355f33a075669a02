"""Captured steps on GPUs: the forward of decode rows, recorded once for each number of rows and of
tokens a row, and run again without Python.

A captured step is launches with fixed addresses and grids. What differs from step to step lies in
memory of the device that is written before each run: tokens, positions, slots, page tables
(`captured_inputs.py`), and the schedules that attention kernels keep with their rows.

Legend: R rows of a bucket, S its samples, X slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.step import StepPlan
from tokenspeed.execution.buckets import Bucket, bucket_for, buckets_of
from tokenspeed.execution.buffers import PageTable
from tokenspeed.execution.captured_inputs import CapturedInputs, CapturedRows
from tokenspeed.execution.cpu_sampler import CpuSampler
from tokenspeed.execution.launched import AwaitedTokens
from tokenspeed.execution.sampler import Sampler
from tokenspeed.kernels import ops
from tokenspeed.kernels.staging import send
from tokenspeed.modeling import Model

__all__ = ["Capture", "CapturedSteps", "CudaCapture"]


class Capture(Protocol):
    """What records launches."""

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Gives what launches all that a call launches once more, without it."""


class CudaCapture:
    """CUDA graphs that share their memory: one of them runs at a time."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`; the first call compiles kernels and makes what libraries keep."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            launch()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
            launch()
        torch.cuda.current_stream().wait_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    """The launches of a bucket; of rows with drafts, whose samples count by one another, tokens are
    chosen on the host."""

    groups: tuple[CapturedRows, ...]
    forward: Callable[[], None]
    forward_and_choose: Callable[[], None] | None
    forward_and_draw: Callable[[], None] | None


class CapturedSteps:
    """Forwards of decode rows: of one token each without the choice of tokens, with that of the
    likeliest, and with draws where a kernel for them can be captured; of rows with drafts without.

    Args:
        model: loaded.
        pools: padded.
        config: gives the greatest numbers of rows and of drafted tokens, and the page size.
        tables: of each cache group, with one slot more than the configuration's, which is theirs
            who fill up.
        last_token_X: int64, the last token of each slot, as many.
        capture: what records.

    Raises:
        KernelError: a kernel of the model cannot be captured.
    """

    def __init__(
        self,
        model: Model,
        pools: KVPools,
        config: SchedulerConfig,
        *,
        tables: Sequence[PageTable],
        last_token_X: torch.Tensor,
        capture: Capture,
    ) -> None:
        self._model = model
        self._pools = pools
        self._last_token_X = last_token_X
        rows_max, device = config.slots_max, last_token_X.device
        self._buckets = buckets_of(rows_max, config.step_drafts_max)
        self._inputs = CapturedInputs(
            pools,
            config,
            tables=tables,
            last_token_X=last_token_X,
            tokens_max=max(bucket.tokens for bucket in self._buckets),
        )
        samples_max = max(bucket.samples for bucket in self._buckets)
        self._logits_SV = torch.empty(
            (samples_max, model.config.vocab_size), dtype=torch.float32, device=device
        )
        self._chosen_R = torch.zeros(rows_max, dtype=torch.int64, device=device)
        # Temperatures, uniform numbers, top-p and min-p; and top-k.
        self._settings = torch.zeros((4, rows_max), dtype=torch.float64, device=device)
        self._settings_host = np.zeros((4, rows_max))
        self._top_ks_R = torch.ones(rows_max, dtype=torch.int64, device=device)
        self._argmax = model.kernels.select(ops.sampling.argmax, format_name="float32")
        self._draw = model.kernels.select_beyond_reference(ops.sampling.draw, format_name="float32")
        # The largest first: the smaller ones then find its memory large enough.
        largest_first = sorted(self._buckets, key=lambda bucket: bucket.tokens, reverse=True)
        self._captured = {bucket: self._capture(bucket, capture) for bucket in largest_first}

    def serves(self, plan: StepPlan) -> bool:
        """Whether a plan is of decode rows alone, no more and no longer ones than were captured."""
        return bucket_for(plan, self._buckets) is not None

    @torch.inference_mode()
    def run(self, plan: StepPlan, *, likeliest: bool) -> tuple[torch.Tensor, AwaitedTokens | None]:
        """Compute a plan that these serve.

        Args:
            plan: what runs.
            likeliest: whether the likeliest token of each row is chosen, which is its slot's last
                one from then on; where a row has a draft none is in any case.

        Returns:
            logits_SV in float32, valid until the next run; the tokens where they are chosen.
        """
        captured = self._prepared(plan)
        logits_SV = self._logits_SV[: len(plan.sample_rows)]
        if not likeliest or captured.forward_and_choose is None:
            captured.forward()
            return logits_SV, None
        captured.forward_and_choose()
        return logits_SV, self._chosen(plan)

    @torch.inference_mode()
    def draw(self, plan: StepPlan, sampler: Sampler | CpuSampler) -> AwaitedTokens | None:
        """Compute a plan that these serve, and draw each row's token, which is its slot's last one
        from then on; None where draws are not captured, a row has a draft, or wants more than a
        draw.

        Args:
            plan: what runs.
            sampler: what each slot's tokens are drawn by.
        """
        rows = len(plan.row_slots)
        if self._draw is None or isinstance(sampler, CpuSampler) or len(plan.sample_rows) > rows:
            return None
        draws = sampler.draws(plan.row_slots, plan.sample_positions)
        if draws is None:
            return None
        captured = self._prepared(plan)
        host = self._settings_host
        host[:, rows:] = 0.0
        host[0, :rows], host[1, :rows] = draws.temperatures_S, draws.uniforms_S
        host[2, :rows], host[3, :rows] = draws.top_ps_S, draws.min_ps_S
        send(host.reshape(-1), self._settings.view(-1))
        send(draws.top_ks_S, self._top_ks_R[:rows])
        assert captured.forward_and_draw is not None
        captured.forward_and_draw()
        return self._chosen(plan)

    def _chosen(self, plan: StepPlan) -> AwaitedTokens:
        return AwaitedTokens(self._chosen_R[: len(plan.row_slots)].clone())

    def _prepared(self, plan: StepPlan) -> _Captured:
        """Write what a run reads; gives what runs."""
        bucket = bucket_for(plan, self._buckets)
        assert bucket is not None, "only plans that these serve are run"
        self._inputs.fill(plan, bucket)
        captured = self._captured[bucket]
        for of_group in captured.groups:
            for kept in of_group.kept.values():
                kept.fill(of_group)
        return captured

    def _capture(self, bucket: Bucket, capture: Capture) -> _Captured:
        groups = self._inputs.rows(bucket)
        slots_R = self._inputs.slots(bucket)
        rows = bucket.rows

        def forward() -> None:
            batch = self._inputs.batch(bucket, groups)
            self._logits_SV[: bucket.samples].copy_(self._model.forward(batch, self._pools))

        def choose(chosen_R: torch.Tensor) -> None:
            self._chosen_R[:rows].copy_(chosen_R)
            self._last_token_X.index_copy_(0, slots_R, chosen_R)

        def forward_and_choose() -> None:
            forward()
            choose(self._argmax(self._logits_SV[:rows]))

        def forward_and_draw() -> None:
            assert self._draw is not None
            forward()
            logits_RV = self._logits_SV[:rows]
            temperatures_R, uniforms_R, top_ps_R, min_ps_R = self._settings[:, :rows].unbind()
            drawn_R = self._draw(
                logits_RV,
                uniforms_R,
                temperatures_S=temperatures_R,
                top_ks_S=self._top_ks_R[:rows],
                top_ps_S=top_ps_R,
                min_ps_S=min_ps_R,
            )
            choose(torch.where(temperatures_R > 0.0, drawn_R, self._argmax(logits_RV)))

        with torch.inference_mode():
            chooses = not bucket.drafts
            draws = chooses and self._draw is not None
            return _Captured(
                groups=groups,
                forward=capture.record(forward),
                forward_and_choose=capture.record(forward_and_choose) if chooses else None,
                forward_and_draw=capture.record(forward_and_draw) if draws else None,
            )
