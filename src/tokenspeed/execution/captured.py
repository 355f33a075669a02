"""Captured steps on GPUs: the forward of decode rows, recorded once for each number of rows and run
again without Python.

A captured step is launches with fixed addresses and grids. What differs from step to step lies in
memory of the device that is written before each run: token positions, slots, page tables, and the
schedules that attention kernels keep with their rows. Rows that only fill up a bucket have a slot
and a page of their own.

Legend: R rows of a bucket, X slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.errors import KernelError
from tokenspeed.core.step import Int32Array, StepPlan
from tokenspeed.execution.buffers import PageTable
from tokenspeed.execution.cpu_sampler import CpuSampler
from tokenspeed.execution.launched import AwaitedTokens
from tokenspeed.execution.sampler import Sampler
from tokenspeed.kernels import ops
from tokenspeed.kernels.rows import PagedRow, PagedRows
from tokenspeed.kernels.staging import send
from tokenspeed.modeling import ForwardBatch, Model

__all__ = ["Capture", "CapturedSteps", "CudaCapture", "buckets_of"]


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


@dataclass(frozen=True, kw_only=True)
class _CapturedRows(PagedRows):
    """Rows whose values on the host are those of one run only."""

    @cached_property
    def by_row(self) -> Sequence[PagedRow]:
        raise KernelError(
            "a kernel that goes through rows on the host computes other steps wrongly once it is "
            "captured; force another solution for it (--kernel OP=SOLUTION)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bucket:
    """A step of some number of rows, with one token each."""

    groups: tuple[_CapturedRows, ...]
    forward: Callable[[], None]
    forward_and_choose: Callable[[], None]
    forward_and_draw: Callable[[], None] | None


def buckets_of(rows_max: int) -> tuple[int, ...]:
    """Numbers of rows that steps are captured for: at most an eighth of a large step is filling."""
    steps = [*(1, 2, 4), *range(8, 64, 8), *range(64, rows_max + 32, 32)]
    return tuple(sorted({min(step, rows_max) for step in steps}))


class CapturedSteps:
    """Forwards of decode rows, one token each: without the choice of tokens, with that of the
    likeliest, and with draws where a kernel for them can be captured.

    Args:
        model: loaded.
        pools: padded.
        config: gives the greatest number of rows, and the page size.
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
        self._config = config
        self._tables = tables
        self._last_token_X = last_token_X
        rows_max, device = config.slots_max, last_token_X.device
        self._padding_slot = len(last_token_X) - 1
        # Slots, positions, and where each group's KV goes, one behind the other.
        self._inputs = torch.zeros((2 + len(tables), rows_max), dtype=torch.int64, device=device)
        self._host = np.zeros((2 + len(tables), rows_max), dtype=np.int64)
        self._row_slots_R = np.full(rows_max, self._padding_slot, dtype=np.int32)
        self._context_lens_R = np.zeros(rows_max, dtype=np.int32)
        self._logits_RV = torch.empty(
            (rows_max, model.config.vocab_size), dtype=torch.float32, device=device
        )
        self._chosen_R = torch.zeros(rows_max, dtype=torch.int64, device=device)
        # Temperatures, uniform numbers, top-p and min-p; and top-k.
        self._settings = torch.zeros((4, rows_max), dtype=torch.float64, device=device)
        self._settings_host = np.zeros((4, rows_max))
        self._top_ks_R = torch.ones(rows_max, dtype=torch.int64, device=device)
        self._argmax = model.kernels.select(ops.sampling.argmax, format_name="float32")
        self._draw = model.kernels.select_beyond_reference(ops.sampling.draw, format_name="float32")
        for table, pool in zip(tables, pools.pools, strict=True):
            assert pool.padding_page is not None
            table.pages_XP[self._padding_slot].fill_(pool.padding_page)
        self._fill(0, None, ())
        # The largest first: the smaller ones then find its memory large enough.
        self._buckets = {
            rows: self._captured(rows, capture) for rows in reversed(buckets_of(rows_max))
        }

    def serves(self, plan: StepPlan) -> bool:
        """Whether all rows of a plan have one token, of which another is sampled."""
        rows = len(plan.row_slots)
        return rows == plan.decode_count == len(plan.token_ids) == len(plan.sample_rows)

    @torch.inference_mode()
    def run(self, plan: StepPlan, *, likeliest: bool) -> tuple[torch.Tensor, AwaitedTokens | None]:
        """Compute a plan that these serve.

        Args:
            plan: what runs.
            likeliest: whether the likeliest token of each row is chosen, which is its slot's last
                one from then on.

        Returns:
            logits_RV in float32, valid until the next run; the tokens where they are chosen.
        """
        rows, bucket = self._prepared(plan)
        if not likeliest:
            bucket.forward()
            return self._logits_RV[:rows], None
        bucket.forward_and_choose()
        return self._logits_RV[:rows], self._chosen(rows)

    @torch.inference_mode()
    def draw(self, plan: StepPlan, sampler: Sampler | CpuSampler) -> AwaitedTokens | None:
        """Compute a plan that these serve, and draw each row's token, which is its slot's last one
        from then on; None where draws are not captured, or a row wants more than one.

        Args:
            plan: what runs.
            sampler: what each slot's tokens are drawn by.
        """
        if self._draw is None or isinstance(sampler, CpuSampler):
            return None
        slots_R = plan.row_slots[plan.sample_rows]
        draws = sampler.draws(slots_R, plan.sample_positions)
        if draws is None:
            return None
        rows, bucket = self._prepared(plan)
        host = self._settings_host
        host[:, rows:] = 0.0
        host[0, :rows], host[1, :rows] = draws.temperatures_S, draws.uniforms_S
        host[2, :rows], host[3, :rows] = draws.top_ps_S, draws.min_ps_S
        send(host.reshape(-1), self._settings.view(-1))
        send(draws.top_ks_S, self._top_ks_R[:rows])
        assert bucket.forward_and_draw is not None
        bucket.forward_and_draw()
        return self._chosen(rows)

    def _chosen(self, rows: int) -> AwaitedTokens:
        return AwaitedTokens(self._chosen_R[:rows].clone())

    def _prepared(self, plan: StepPlan) -> tuple[int, _Bucket]:
        """Write what a run reads; gives the rows, and the bucket that they are run in."""
        rows = len(plan.row_slots)
        for table, group in zip(self._tables, plan.groups, strict=True):
            table.apply(group)
        self._row_slots_R[:rows] = plan.row_slots
        self._row_slots_R[rows:] = self._padding_slot
        self._context_lens_R[:rows] = plan.context_lens
        self._context_lens_R[rows:] = 0
        self._fill(rows, plan.context_lens, [group.kv_slots for group in plan.groups])
        bucket = self._buckets[min(size for size in self._buckets if size >= rows)]
        for of_group in bucket.groups:
            for kept in of_group.kept.values():
                kept.fill(of_group)
        return rows, bucket

    def _fill(
        self, rows: int, positions: Int32Array | None, kv_slots: Sequence[Int32Array]
    ) -> None:
        page_size = self._config.page_size
        self._host[0] = self._row_slots_R
        self._host[1] = 0
        if positions is not None:
            self._host[1, :rows] = positions
        beyond = np.arange(self._host.shape[1]) % page_size
        for index, pool in enumerate(self._pools.pools):
            assert pool.padding_page is not None
            self._host[2 + index] = pool.padding_page * page_size + beyond
            if kv_slots:
                self._host[2 + index, :rows] = kv_slots[index]
        send(self._host.reshape(-1), self._inputs.view(-1))

    def _captured(self, rows: int, capture: Capture) -> _Bucket:
        groups = tuple(
            _CapturedRows(
                query_starts=np.arange(rows + 1, dtype=np.int32),
                context_lens=self._context_lens_R[:rows],
                row_slots=self._row_slots_R[:rows],
                page_table_XP=table.pages_XP,
                kv_slots_T=self._inputs[2 + index, :rows],
                page_size=self._config.page_size,
            )
            for index, table in enumerate(self._tables)
        )
        slots_R = self._inputs[0, :rows]

        def forward() -> None:
            batch = ForwardBatch(
                token_ids_T=self._last_token_X.index_select(0, slots_R),
                positions_T=self._inputs[1, :rows],
                groups=groups,
                sample_token_indices_S=None,
            )
            self._logits_RV[:rows].copy_(self._model.forward(batch, self._pools))

        def choose(chosen_R: torch.Tensor) -> None:
            self._chosen_R[:rows].copy_(chosen_R)
            self._last_token_X.index_copy_(0, slots_R, chosen_R)

        def forward_and_choose() -> None:
            forward()
            choose(self._argmax(self._logits_RV[:rows]))

        def forward_and_draw() -> None:
            assert self._draw is not None
            forward()
            logits_RV = self._logits_RV[:rows]
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
            return _Bucket(
                groups=groups,
                forward=capture.record(forward),
                forward_and_choose=capture.record(forward_and_choose),
                forward_and_draw=capture.record(forward_and_draw) if self._draw else None,
            )
