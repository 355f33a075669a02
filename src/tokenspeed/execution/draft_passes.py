"""The forward passes of a draft model: what it has yet to read, then token after token.

Legend: R rows, S sampled rows, V vocabulary, M features of hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tokenspeed.cache import KVPools
from tokenspeed.core.config import SchedulerConfig
from tokenspeed.core.step import Float32Array, GroupPlan, Int32Array, StepPlan
from tokenspeed.execution.buffers import PageTable
from tokenspeed.execution.captured import Capture
from tokenspeed.execution.draft_text import DraftProposal, DraftRow
from tokenspeed.execution.forward import StepForward
from tokenspeed.execution.launched import AwaitedTokens
from tokenspeed.kernels import ops
from tokenspeed.modeling import GivenStates, Head, Model

__all__ = ["DraftPasses", "Drafting", "Proposals"]

_NONE = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """A draft model that was loaded.

    Attributes:
        model: one of the target's vocabulary, or a `Head` of the target.
        pools: its KV; a head's have as many pages as the target's pools.
        groups: of each of a head's cache groups, whose pages of the target's it lies in; () for a
            model that is no head.
        window: of a request, the most tokens that a model reads before it proposes; 0 for a head,
            which reads along.
        chance_min: a row's proposal ends where all of it is right with less than this chance.
    """

    model: Model
    pools: KVPools
    groups: tuple[int, ...] = ()
    window: int = 0
    chance_min: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """How a step's rows go on.

    Attributes:
        starts: int32 [R + 1]; row r is to go on with tokens starts[r] : starts[r + 1].
        tokens: int32 [P].
        chances: float32 [P], of each token the draft model's probability behind those before it.
        caught_up: tokens that the draft model read for it, beyond the last one of each row.
    """

    starts: Int32Array
    tokens: Int32Array
    chances: Float32Array
    caught_up: int = 0

    @classmethod
    def of(
        cls, rows: int, proposals: "dict[int, DraftProposal]", *, caught_up: int = 0
    ) -> "Proposals":
        """What was proposed for some of a step's rows, in their order."""
        counts = [len(proposals[row].tokens) if row in proposals else 0 for row in range(rows)]
        return cls(
            starts=np.cumsum([0, *counts], dtype=np.int32),
            tokens=np.array([t for p in proposals.values() for t in p.tokens], dtype=np.int32),
            chances=np.array([c for p in proposals.values() for c in p.chances], dtype=np.float32),
            caught_up=caught_up,
        )


class DraftPasses:
    """Runs a draft model.

    Args:
        drafting: the model.
        config: the greatest sizes of a pass.
        vocabulary: tokens that the target has logits of.
        tables: the page tables of its cache groups.
        device: where it runs.
        capture: what records launches on a GPU; None on a CPU.
    """

    def __init__(
        self,
        drafting: Drafting,
        config: SchedulerConfig,
        *,
        vocabulary: int,
        tables: Sequence[PageTable],
        device: torch.device,
        capture: Capture | None,
    ) -> None:
        self._config = replace(
            config, step_drafts_max=0, step_proposals_max=0, proposal_length_max=0
        )
        self._chance_min = drafting.chance_min
        # Both know the same tokens; the tables of one may be filled up to another size.
        self._vocabulary = drafting.model.config.vocab_size
        self._known = vocabulary
        self._device = device
        self._head = drafting.model if isinstance(drafting.model, Head) else None
        self._tables = tables
        self._steps = StepForward(
            drafting.model,
            drafting.pools,
            self._config,
            tables=tables,
            device=device,
            capture=capture,
            state_layers=() if self._head is None else (0,),
        )
        kernels = drafting.model.kernels
        self._argmax = kernels.select(ops.sampling.argmax, format_name="float32")
        self._logprobs = kernels.select(ops.sampling.logprobs, format_name="float32")

    def record(self) -> None:
        """Record the forward where the device can; to be called once."""
        # What a head does beside products, and that is little, is done by PyTorch.
        if self._head is None:
            self._steps.record()

    @torch.inference_mode()
    def propose(self, rows: list[DraftRow], proposals: Sequence[DraftProposal]) -> None:
        """Run rows, then what follows of those that are sampled, token by token.

        Args:
            rows: at most one of a slot.
            proposals: of each sampled row's slot, to be filled in.
        """
        going_on = list(proposals)
        by_slot = {proposal.slot: proposal for proposal in going_on}
        own = False
        while rows:
            for slot, token, chance, states_1M in self._run(rows, own=own):
                by_slot[slot].states_1M = states_1M
                if token < self._known:
                    by_slot[slot].take(token, chance)
                else:
                    by_slot[slot].most = 0
            own = True
            going_on = [
                proposal
                for proposal in going_on
                if len(proposal.tokens) < proposal.most and proposal.chance >= self._chance_min
            ]
            rows = [
                DraftRow(
                    proposal.slot,
                    proposal.first + len(proposal.tokens),
                    proposal.tokens[-1:],
                    True,
                    proposal.states_1M,
                )
                for proposal in going_on
            ]

    def _run(
        self, rows: list[DraftRow], *, own: bool
    ) -> list[tuple[int, int, float, torch.Tensor | None]]:
        """Slot, likeliest token, its probability and a head's states behind each row that is
        sampled."""
        found: list[tuple[int, int, float, torch.Tensor | None]] = []
        left = rows
        while left:
            now: list[DraftRow] = []
            later: list[DraftRow] = []
            room = self._config.step_tokens_max
            for row in left:
                count = min(len(row.tokens), room)
                room -= count
                first, rest = row.cut(count)
                now += [first] if first.tokens else []
                later += [rest] if rest.tokens else []
            sampled = [row.slot for row in now if row.sampled]
            tokens, chances = self._compute(now, own=own)
            states: Sequence[torch.Tensor | None] = [None] * len(sampled)
            if self._head is not None:
                states_SM = self._steps.states(len(sampled))
                states = [states_SM[index : index + 1] for index in range(len(sampled))]
            found += zip(sampled, tokens.tolist(), chances.tolist(), states, strict=True)
            left = later
        return found

    def _compute(self, rows: list[DraftRow], *, own: bool) -> tuple[Int32Array, Float32Array]:
        """The likeliest token, and its probability, behind each row that is sampled."""
        plan = self._plan(rows)
        slots_S = plan.row_slots[plan.sample_rows]
        if plan.decode_count:
            self._steps.set_last_tokens(plan.row_slots, plan.token_ids)
        recorded = self._steps.recorded
        if recorded is not None and recorded.serves(plan):
            logits_SV, chosen = recorded.run(plan, likeliest=True)
            assert chosen is not None
            tokens = chosen.result().tokens if isinstance(chosen, AwaitedTokens) else chosen
            tokens_S = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        else:
            states = [row.states_TF for row in rows if row.states_TF is not None]
            given = GivenStates(states_TF=torch.cat(states), own=own) if states else None
            logits_SV = self._steps.logits(plan, given)
            tokens_S = self._argmax(logits_SV)
            ids_S = tokens_S if self._head is None else self._head.tokens(tokens_S)
            tokens = ids_S.cpu().numpy().astype(np.int32)
        if not len(slots_S):
            return tokens, np.zeros(0, dtype=np.float32)
        chances_S, _, _ = self._logprobs(logits_SV, tokens_S, 0)
        return tokens, chances_S.exp().cpu().numpy()

    def _plan(self, rows: list[DraftRow]) -> StepPlan:
        counts = [len(row.tokens) for row in rows]
        sampled = [index for index, row in enumerate(rows) if row.sampled]
        tokens = np.array([token for row in rows for token in row.tokens], dtype=np.int32)
        decoding = len(sampled) == len(rows) and max(counts) == 1
        page_size = self._config.page_size
        groups = tuple(
            GroupPlan(
                kv_slots=np.concatenate(
                    [
                        table.kv_slots(row.slot, row.first, count, page_size=page_size)
                        for row, count in zip(rows, counts, strict=True)
                    ],
                    dtype=np.int32,
                ),
                table_slots=_NONE,
                table_indices=_NONE,
                table_pages=_NONE,
            )
            for table in self._tables
        )
        return StepPlan(
            step=0,
            decode_count=len(rows) if decoding else 0,
            row_slots=np.array([row.slot for row in rows], dtype=np.int32),
            query_starts=np.cumsum([0, *counts], dtype=np.int32),
            context_lens=np.array([row.first for row in rows], dtype=np.int32),
            token_ids=np.where(tokens < self._vocabulary, tokens, 0),
            sample_rows=np.array(sampled, dtype=np.int32),
            sample_positions=np.zeros(len(sampled), dtype=np.int32),
            bound_slots=_NONE,
            bound_requests=np.zeros(0, dtype=np.int64),
            groups=groups,
        )
