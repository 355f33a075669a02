"""What captured steps read: memory with fixed addresses, written before each run.

Legend: T tokens of a bucket, R its rows, X slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.errors import KernelError
from tokenspeed.core.step import StepPlan
from tokenspeed.execution.buckets import Bucket
from tokenspeed.execution.buffers import PageTable
from tokenspeed.kernels.rows import PagedRow, PagedRows, PartedRows
from tokenspeed.kernels.staging import send
from tokenspeed.modeling import ForwardBatch

__all__ = ["CapturedInputs", "CapturedRows"]

_SLOTS, _POSITIONS, _GUESSES, _SAMPLED, _KV = range(5)


@dataclass(frozen=True, kw_only=True)
class CapturedRows(PagedRows):
    """Rows whose values on the host are those of one run only."""

    @cached_property
    def by_row(self) -> Sequence[PagedRow]:
        raise _host_rows()

    def seen(self, window: int | None) -> npt.NDArray[np.int32]:
        """Known on the host for one run only.

        Raises:
            KernelError: always.
        """
        raise _host_rows()

    def parted(self, seen_by_min: float) -> PartedRows | None:
        """No row of a few tokens is a prompt, whatever its context."""
        return None


def _host_rows() -> KernelError:
    return KernelError(
        "a kernel that goes through rows on the host computes other steps wrongly once it is "
        "captured; force another solution for it (--kernel OP=SOLUTION)"
    )


class CapturedInputs:
    """Slots, tokens, positions, where KV goes and whose logits are wanted, for any bucket.

    Rows that fill up a bucket have a slot and a page of their own. Tokens that fill up a row stand
    at the positions behind it: what counts does not see them, their KV goes to that page, and
    attention reads nothing where KV would have been theirs (`PagedRows.token_counts`).

    Args:
        pools: padded.
        config: gives the greatest numbers of rows and of pages.
        tables: of each cache group, with one slot more than the configuration's.
        last_token_X: int64, the last token of each slot, as many.
        tokens_max: of the largest bucket.
    """

    def __init__(
        self,
        pools: KVPools,
        config: SchedulerConfig,
        *,
        tables: Sequence[PageTable],
        last_token_X: torch.Tensor,
        tokens_max: int,
    ) -> None:
        self._tables = tables
        self._last_token_X = last_token_X
        self._page_size = config.page_size
        self._padding_slot = len(last_token_X) - 1
        shape = (_KV + len(tables), tokens_max)
        self._on_device = torch.zeros(shape, dtype=torch.int64, device=last_token_X.device)
        self._host = np.zeros(shape, dtype=np.int64)
        self._row_slots_R = np.full(tokens_max, self._padding_slot, dtype=np.int32)
        self._context_lens_R = np.zeros(tokens_max, dtype=np.int32)
        self._token_counts_R = np.ones(tokens_max, dtype=np.int32)
        self._nowhere = np.empty((len(tables), tokens_max), dtype=np.int64)
        for index, (table, pool) in enumerate(zip(tables, pools.pools, strict=True)):
            assert pool.padding_page is not None
            pool.clear_padding()
            table.pages_XP[self._padding_slot].fill_(pool.padding_page)
            first = pool.padding_page * config.page_size
            self._nowhere[index] = first + np.arange(tokens_max) % config.page_size
        self._host[_SLOTS] = self._padding_slot
        self._host[_KV:] = self._nowhere
        send(self._host.reshape(-1), self._on_device.view(-1))

    def rows(self, bucket: Bucket) -> tuple[CapturedRows, ...]:
        """A bucket's rows in each cache group, as those of the last `fill` for it."""
        count = bucket.rows
        return tuple(
            CapturedRows(
                query_starts=np.arange(count + 1, dtype=np.int32) * bucket.width,
                context_lens=self._context_lens_R[:count],
                row_slots=self._row_slots_R[:count],
                page_table_XP=table.pages_XP,
                kv_slots_T=self._on_device[_KV + index, : bucket.tokens],
                page_size=self._page_size,
                token_counts=self._token_counts_R[:count],
            )
            for index, table in enumerate(self._tables)
        )

    def slots(self, bucket: Bucket) -> torch.Tensor:
        """int64 [R] on the device."""
        return self._on_device[_SLOTS, : bucket.rows]

    def batch(self, bucket: Bucket, groups: tuple[PagedRows, ...]) -> ForwardBatch:
        """What a model computes; to be captured with it."""
        token_ids_T = self._last_token_X.index_select(0, self.slots(bucket))
        if bucket.drafts:
            guesses_RL = self._on_device[_GUESSES, : bucket.tokens].view(bucket.rows, bucket.width)
            token_ids_T = torch.cat((token_ids_T[:, None], guesses_RL[:, 1:]), dim=1).view(-1)
        return ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=self._on_device[_POSITIONS, : bucket.tokens],
            groups=groups,
            sample_token_indices_S=(
                self._on_device[_SAMPLED, : bucket.samples] if bucket.drafts else None
            ),
        )

    def fill(self, plan: StepPlan, bucket: Bucket) -> None:
        """Write what a run of a plan reads, page tables too.

        Args:
            plan: decode rows, all of whose tokens are sampled.
            bucket: one that it fits into.
        """
        for table, group in zip(self._tables, plan.groups, strict=True):
            table.apply(group)
        rows, tokens = len(plan.row_slots), len(plan.token_ids)
        lengths_R = plan.query_starts[1:] - plan.query_starts[:-1]
        self._row_slots_R[:rows] = plan.row_slots
        self._row_slots_R[rows:] = self._padding_slot
        self._context_lens_R[:rows] = plan.context_lens
        self._context_lens_R[rows:] = 0
        self._token_counts_R[:rows] = lengths_R
        self._token_counts_R[rows:] = 1
        # Where the plan's tokens stand in the bucket.
        shifts_R = np.arange(rows) * bucket.width - plan.query_starts[:-1]
        at_T = np.arange(tokens) + np.repeat(shifts_R, lengths_R)
        host = self._host
        host[_SLOTS] = self._row_slots_R
        positions_RL = self._context_lens_R[: bucket.rows, None] + np.arange(bucket.width)
        host[_POSITIONS, : bucket.tokens] = positions_RL.reshape(-1)
        host[_GUESSES] = 0
        host[_GUESSES, at_T] = plan.token_ids
        host[_SAMPLED] = 0
        host[_SAMPLED, :tokens] = at_T
        host[_KV:] = self._nowhere
        for index, group in enumerate(plan.groups):
            host[_KV + index, at_T] = group.kv_slots
        send(host.reshape(-1), self._on_device.view(-1))
