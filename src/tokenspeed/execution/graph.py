"""Step graphs on CPUs: a decode step's kernel calls, recorded once and run again without Python.

Legend: R rows, X slots, P pages of a slot.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.step import Int32Array, StepPlan
from tokenspeed.kernels import ops
from tokenspeed.kernels.cpu import StepRecording
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.modeling import ForwardBatch, Model

__all__ = ["DecodeGraph"]

# Its memory grows with the rows it may have; beyond these a step is long enough for Python.
_ROWS_MAX = 64

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
    """Keeps all memory that is made, and lets nothing but views pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[torch.Tensor] = []

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
        if func not in _ALLOCATIONS and func not in _VIEWS:
            raise _NotRecordable(str(func))
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.kept.append(result)
        return result


class DecodeGraph:
    """The forward of steps whose rows are all decode rows.

    Attributes:
        rows_max: R, the most rows such a step may have.
    """

    def __init__(
        self,
        *,
        recording: StepRecording,
        rows_max: int,
        logits_RV: torch.Tensor,
        kept: Sequence[object],
    ) -> None:
        self.rows_max = rows_max
        self._recording = recording
        self._logits_RV = logits_RV
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
    ) -> "DecodeGraph | None":
        """Record a model's forward; None where any part of it is not a native CPU kernel.

        Nothing is computed meanwhile.

        Args:
            model: loaded.
            pools: the KV storage that plans name pages of.
            config: gives the greatest number of rows, and the page size.
            tables: int32 [X, P] of each cache group, which runs keep up to date.
            last_token_X: int64, the last token of each slot, likewise.
        """
        rows_max = min(config.slots_max, config.step_tokens_max, _ROWS_MAX)
        token_ids_R = torch.zeros(rows_max, dtype=torch.int64)
        positions_R = torch.zeros(rows_max, dtype=torch.int64)
        context_lens_R = np.zeros(rows_max, dtype=np.int32)
        row_slots_R = np.zeros(rows_max, dtype=np.int32)
        starts = np.arange(rows_max + 1, dtype=np.int32)
        groups = tuple(
            PagedRows(
                query_starts=starts,
                context_lens=context_lens_R,
                row_slots=row_slots_R,
                page_table_XP=table_XP,
                kv_slots_T=torch.zeros(rows_max, dtype=torch.int64),
                page_size=config.page_size,
            )
            for table_XP in tables
        )
        batch = ForwardBatch(
            token_ids_T=token_ids_R,
            positions_T=positions_R,
            groups=groups,
            sample_token_indices_S=None,
        )
        argmax = model.kernels.select(ops.sampling.argmax, format_name="float32")
        recording = StepRecording(
            model.kernels.runtime,
            token_ids_R,
            positions_R,
            context_lens_R,
            row_slots_R,
            last_token_X,
            [(group.kv_slots_T, group.page_table_XP) for group in groups],
        )
        keeper = _Keeper()
        recording.begin()
        chosen_R = last_token_X
        try:
            with keeper:
                logits_RV = model.forward(batch, pools)
                chosen_R = argmax(logits_RV)
        except _NotRecordable:
            return None
        finally:
            recording.end(chosen_R)
        return cls(
            recording=recording,
            rows_max=rows_max,
            logits_RV=logits_RV,
            kept=(batch, keeper.kept),
        )

    def fits(self, plan: StepPlan) -> bool:
        """Whether a plan's rows are all decode rows, each of them sampled, and not too many."""
        rows = len(plan.row_slots)
        return rows == plan.decode_count == len(plan.sample_rows) and rows <= self.rows_max

    def run(self, plan: StepPlan) -> tuple[torch.Tensor, Int32Array]:
        """Compute a plan that fits.

        Returns:
            logits_SV in float32, valid until the next run, and the likeliest token of each row,
            which is its slot's last one from now on.
        """
        tokens = np.empty(len(plan.row_slots), dtype=np.int32)
        self._recording.run(
            plan.row_slots,
            plan.context_lens,
            [
                (group.kv_slots, group.table_slots, group.table_indices, group.table_pages)
                for group in plan.groups
            ],
            tokens,
        )
        return self._logits_RV[: len(tokens)], tokens
