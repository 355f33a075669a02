"""The forward of one model over plans: as steps that were recorded, or through Python.

Legend: T tokens, S sampled rows, X slots, D decode rows, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.samples import Samples
from tokenspeed.core.step import GroupPlan, Int32Array, StepPlan
from tokenspeed.execution.buffers import InputBuffer, PageTable
from tokenspeed.execution.captured import Capture
from tokenspeed.execution.graph import StepGraph
from tokenspeed.execution.launched import RecordedSteps
from tokenspeed.execution.recorded import record_steps
from tokenspeed.kernels.rows import ContextShare, PagedRows
from tokenspeed.modeling import ForwardBatch, GivenStates, HiddenStates, Model

__all__ = ["StepForward"]


class StepForward:
    """A model, the buffers its forward reads from, and the last token of every slot.

    Args:
        model: loaded, on `device`.
        pools: the KV storage that plans name pages of.
        config: the greatest sizes of a plan.
        tables: of each cache group; plans keep them up to date.
        device: where the model runs.
        capture: what records launches on a GPU; None on a CPU.
        share: which positions of a context the pools hold, where ranks share one; they are padded
            then. None for all.
        state_layers: of `HiddenStates`, which every step keeps then.

    Attributes:
        last_token_X: int64 on the device, of every slot the token that its decode row begins with.
        recorded: what runs without Python; None until `record`, and where nothing could be.
    """

    def __init__(
        self,
        model: Model,
        pools: KVPools,
        config: SchedulerConfig,
        *,
        tables: Sequence[PageTable],
        device: torch.device,
        capture: Capture | None,
        share: ContextShare | None = None,
        state_layers: Sequence[int] = (),
    ) -> None:
        self._model = model
        self._pools = pools
        self._config = config
        self._share = share
        # Positions of a page on this rank.
        self._page_size = config.page_size // (share.ranks if share else 1)
        self._tables = tables
        self._capture = capture
        self._device = device
        self._token_ids = InputBuffer(config.step_tokens_max, device=device)
        self._positions = InputBuffer(config.step_tokens_max, device=device)
        self._sampled = InputBuffer(config.slots_max + config.step_drafts_max, device=device)
        self._lasts = InputBuffer(config.slots_max, device=device)
        self._decode_slots = InputBuffer(config.slots_max, device=device)
        self._decode_starts = InputBuffer(config.slots_max, device=device)
        self._kv_slots = [InputBuffer(config.step_tokens_max, device=device) for _ in tables]
        # Rows that fill up a captured step have a slot of their own.
        slots = config.slots_max + (capture is not None)
        self.last_token_X = torch.zeros(slots, dtype=torch.int64, device=device)
        self.recorded: RecordedSteps | None = None
        self._state_layers = tuple(state_layers)
        self._states: HiddenStates | None = None

    def record(self) -> None:
        """Record what can be; to be called once."""
        if self._model.ranks > 1 and self._model.exchanges is None:
            return
        self.recorded = record_steps(
            self._model,
            self._pools,
            self._config,
            tables=self._tables,
            last_token_X=self.last_token_X,
            capture=self._capture,
            state_layers=self._state_layers,
        )

    def set_last_tokens(self, slots: Int32Array, tokens: npt.NDArray[np.integer]) -> None:
        """Let decode rows of these slots begin with these tokens."""
        self.last_token_X[self._lasts.fill(slots)] = torch.from_numpy(tokens.astype(np.int64)).to(
            self._device
        )

    def logits(self, plan: StepPlan, given: GivenStates | None = None) -> torch.Tensor:
        """logits_SV of a plan, float32, through Python; a head of drafts is given states."""
        self._states = HiddenStates(self._state_layers) if self._state_layers else None
        return self._model.forward(self._batch(plan, given), self._pools)

    def compute(self, plan: StepPlan) -> None:
        """A plan whose logits nobody here asks for; one without rows has changes of page tables."""
        if not len(plan.row_slots):
            for table, group in zip(self._tables, plan.groups, strict=True):
                table.apply(group)
        elif isinstance(self.recorded, StepGraph):
            self.recorded.run(plan)
        else:
            self.logits(plan)

    def states(self, tokens: int) -> torch.Tensor:
        """States that the last step kept of its first tokens, float32; to be asked for once."""
        states, self._states = self._states, None
        if states is None:
            assert isinstance(self.recorded, StepGraph)
            states = self.recorded.states
        assert states is not None, "no states were asked for"
        return states.states(tokens)

    def _batch(self, plan: StepPlan, given: GivenStates | None) -> ForwardBatch:
        """The plan's values in the static buffers, with what only this side knows."""
        starts, ends = plan.query_starts[:-1], plan.query_starts[1:]
        # Token t of row r stands at context_lens[r] + t - query_starts[r].
        positions_T = np.arange(len(plan.token_ids)) + np.repeat(
            plan.context_lens - starts, ends - starts
        )
        token_ids_T = self._token_ids.fill(plan.token_ids)
        decode_slots_D = self._decode_slots.fill(plan.row_slots[: plan.decode_count])
        decode_starts_D = self._decode_starts.fill(starts[: plan.decode_count])
        token_ids_T[decode_starts_D] = self.last_token_X[decode_slots_D]
        groups = []
        for group, table, kv_slots in zip(plan.groups, self._tables, self._kv_slots, strict=True):
            table.apply(group)
            groups.append(
                PagedRows(
                    query_starts=plan.query_starts,
                    context_lens=plan.context_lens,
                    row_slots=plan.row_slots,
                    page_table_XP=table.pages_XP,
                    kv_slots_T=kv_slots.fill(self._slots(group)),
                    page_size=self._page_size,
                    share=self._share,
                )
            )
        return ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=self._positions.fill(positions_T),
            groups=tuple(groups),
            sample_token_indices_S=self._sampled.fill(Samples.of(plan).tokens_S),
            kept=self._states,
            given=given,
        )

    def _slots(self, group: GroupPlan) -> npt.NDArray[np.integer]:
        """Where tokens' KV goes, of which other ranks may keep some."""
        if self._share is None:
            return group.kv_slots
        elsewhere = self._pools.pools[0].pages * self._page_size
        return self._share.slots(group.kv_slots, self._page_size, elsewhere)
