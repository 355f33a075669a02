"""The sampler: from logits to tokens, each row by its own request's parameters.

Order of operations, per row:

    1. log-probabilities, where asked for, from the logits as they came
    2. grammar bitmask
    3. stop tokens excluded while fewer than `min_new_tokens` were sampled
    4. logit bias
    5. repetition, then presence and frequency penalties
    6. temperature 0: the likeliest token, and done
    7. temperature, min-p, top-k, top-p
    8. a draw from what is left, by a uniform number that depends on seed and position alone

A row in which 3 leaves no token possible goes without 3; one in which nothing is possible all the
same gets the likeliest token of the logits as they came, or, where it has a bitmask, one that this
allows.

Legend: S sampled rows, V vocabulary, X slots, W 32-bit words of V bits, K likeliest tokens.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import Int32Array, SampledLogprobs
from tokenspeed.execution.history import TokenHistory
from tokenspeed.execution.philox import uniforms
from tokenspeed.execution.platform import one_thread
from tokenspeed.kernels import KernelSelector
from tokenspeed.kernels.ops import sampling as ops

__all__ = ["Draws", "Sampler"]

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Bias:
    """Token ids and what is added to their logits."""

    ids: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """What the choice of each row's token hangs on beside its logits, in the terms of
    `sampling.draw`.

    Attributes:
        uniforms_S, top_ps_S, min_ps_S: float64.
        temperatures_S: float64; 0 for the likeliest token.
        top_ks_S: int64.
    """

    uniforms_S: npt.NDArray[np.float64]
    temperatures_S: npt.NDArray[np.float64]
    top_ks_S: npt.NDArray[np.int64]
    top_ps_S: npt.NDArray[np.float64]
    min_ps_S: npt.NDArray[np.float64]


class Sampler:
    """Samples the rows of a step; holds the parameters of every slot.

    Args:
        slots_max: X.
        vocabulary: V, which every row of logits has.
        kernels: chooses the sampling kernels, and names the device of the logits.
    """

    def __init__(self, *, slots_max: int, vocabulary: int, kernels: KernelSelector) -> None:
        self._vocabulary = vocabulary
        self._device = kernels.device
        self._argmax = kernels.select(ops.argmax, format_name="float32")
        self._draw = kernels.select(ops.draw, format_name="float32")
        self._logprobs = kernels.select(ops.logprobs, format_name="float32")
        self._penalise = kernels.select(ops.penalise, format_name="float32")
        self._add_bias = kernels.select(ops.add_bias, format_name="float32")
        self._apply_bitmask = kernels.select(ops.apply_bitmask, format_name="float32")
        self._temperature_X = np.zeros(slots_max, dtype=np.float64)
        self._top_k_X = np.full(slots_max, vocabulary, dtype=np.int64)
        self._top_p_X = np.ones(slots_max, dtype=np.float64)
        self._min_p_X = np.zeros(slots_max, dtype=np.float64)
        self._seed_X = np.zeros(slots_max, dtype=np.uint64)
        self._min_new_X = np.zeros(slots_max, dtype=np.int64)
        self._edited_X = np.zeros(slots_max, dtype=np.bool_)
        self._reports_X = np.zeros(slots_max, dtype=np.bool_)
        self._top_logprobs_X = np.zeros(slots_max, dtype=np.int32)
        self._one_by_one_X = np.zeros(slots_max, dtype=np.bool_)
        # Slots of requests that want more than the likeliest token.
        self._others: set[int] = set()
        # Only slots whose requests need them have an entry.
        self._stops: dict[int, torch.Tensor] = {}
        self._bias: dict[int, _Bias] = {}
        self._history: dict[int, TokenHistory] = {}
        # What slots may get next that may not get any token.
        self._bitmasks: dict[int, Future[torch.Tensor | None]] = {}

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
        """Give a slot to a request; the one that had it is forgotten.

        Args:
            slot: below `slots_max`.
            params: the ids of its logit bias are below V.
            seed: 64-bit seed of the request's draws.
            prompt_count: tokens of the prompt.
            tokens: prompt and output so far; needed only where `params.needs_history`.
            stop_token_ids: what `min_new_tokens` excludes; ids that no row has are passed over.
        """
        self._temperature_X[slot] = params.temperature
        self._top_k_X[slot] = min(params.top_k or self._vocabulary, self._vocabulary)
        self._top_p_X[slot] = params.top_p
        self._min_p_X[slot] = params.min_p
        self._seed_X[slot] = seed
        self._min_new_X[slot] = params.min_new_tokens
        self._edited_X[slot] = params.needs_history or bool(params.logit_bias)
        self._reports_X[slot] = params.logprobs is not None
        self._top_logprobs_X[slot] = min(params.logprobs or 0, self._vocabulary)
        self._one_by_one_X[slot] = params.needs_history or params.logprobs is not None
        for table in (self._stops, self._bias, self._history):
            table.pop(slot, None)
        self._others.discard(slot)
        if (
            params.temperature > 0.0
            or params.min_new_tokens
            or params.logprobs is not None
            or self._edited_X[slot]
        ):
            self._others.add(slot)
        if params.min_new_tokens:
            known = stop_token_ids[stop_token_ids < self._vocabulary]
            self._stops[slot] = self._tensor(known.astype(np.int64))
        if params.logit_bias:
            ids = np.array(list(params.logit_bias.keys()), dtype=np.int64)
            assert ids.max() < self._vocabulary, "the engine admits no bias outside the vocabulary"
            values = np.array(list(params.logit_bias.values()), dtype=np.float32)
            self._bias[slot] = _Bias(self._tensor(ids), self._tensor(values))
        if params.needs_history:
            assert tokens is not None, "a request with penalties comes with its tokens"
            self._history[slot] = TokenHistory(
                tokens,
                prompt_count=prompt_count,
                vocabulary=self._vocabulary,
                params=params,
                device=self._device,
            )

    def expect(self, slot: int) -> None:
        """Have the slot's next token wait until `allow` says which it may be."""
        self._bitmasks[slot] = Future()

    def allow(self, slot: int, bitmasks: torch.Tensor | None) -> None:
        """Say which the slot's next token may be, or its next ones.

        Args:
            slot: below `slots_max`.
            bitmasks: int32 [W]; bit v % 32 of word v // 32 is set where token v is allowed, and
                some bit is. Or [J, W] for the slot's first row of the next step and those behind
                it; rows beyond them may be any. None allows any.
        """
        expected = self._bitmasks.get(slot)
        if expected is None or expected.done():
            if bitmasks is None:
                self._bitmasks.pop(slot, None)
                return
            expected = self._bitmasks[slot] = Future()
        expected.set_result(bitmasks)

    def takes_likeliest(self, slots_S: Int32Array) -> bool:
        """Whether `sample` is the likeliest token of each row, and no more."""
        slots = slots_S.tolist()
        return self._others.isdisjoint(slots) and self._bitmasks.keys().isdisjoint(slots)

    def draws(self, slots_S: Int32Array, positions_S: Int32Array) -> Draws | None:
        """What `sample` would draw by; None where a row wants more than a token of its logits.

        Args:
            slots_S, positions_S: as for `sample`.
        """
        more_S = self._edited_X[slots_S] | self._reports_X[slots_S]
        more_S |= positions_S < self._min_new_X[slots_S]
        if more_S.any() or not self._bitmasks.keys().isdisjoint(slots_S.tolist()):
            return None
        return Draws(
            uniforms_S=uniforms(self._seed_X[slots_S], positions_S),
            temperatures_S=self._temperature_X[slots_S],
            top_ks_S=self._top_k_X[slots_S],
            top_ps_S=self._top_p_X[slots_S],
            min_ps_S=self._min_p_X[slots_S],
        )

    def one_by_one(self, slots_S: Int32Array) -> BoolArray:
        """Whose tokens are sampled one after the other, so that each has those before it as its
        history, or none is sampled, and reported, in vain."""
        return self._one_by_one_X[slots_S]

    def sample(
        self, logits_SV: torch.Tensor, slots_S: Int32Array, positions_S: Int32Array
    ) -> tuple[torch.Tensor, SampledLogprobs | None]:
        """A token for each row.

        Args:
            logits_SV: float32, contiguous; the sampler may change them.
            slots_S: the slot of each row's request.
            positions_S: index of the output token to be sampled, 0 for the first.

        Returns:
            int64 tokens [S] on the logits' device, and what was asked for of log-probabilities.
        """
        if self.takes_likeliest(slots_S):
            return self._argmax(logits_SV), None
        bitmasks = self._take_bitmasks(slots_S)
        excluding_S = positions_S < self._min_new_X[slots_S]
        edited_S = self._edited_X[slots_S] | excluding_S
        edited_S[list(bitmasks)] = True
        reports_S = self._reports_X[slots_S]
        drawn_S = self._temperature_X[slots_S] > 0.0
        with one_thread():
            original = self._edit_rows(logits_SV, slots_S, edited_S, excluding_S, bitmasks)
            tokens_S = self._choose(logits_SV, slots_S, positions_S, drawn_S)
            report = self._report(logits_SV, original, slots_S, tokens_S, reports_S)
        for slot, token in zip(slots_S.tolist(), tokens_S.tolist(), strict=True):
            if slot in self._history:
                self._history[slot].push(token)
        return tokens_S, report

    def _take_bitmasks(self, slots_S: Int32Array) -> dict[int, torch.Tensor]:
        """Wait for them: int32 [1, W] of each row that has one, on the logits' device."""
        bitmasks = {}
        before, of_slot = None, 0
        for row, slot in enumerate(slots_S.tolist()):
            of_slot = of_slot + 1 if slot == before else 0
            before = slot
            found = self._bitmasks[slot].result() if slot in self._bitmasks else None
            if found is None:
                continue
            bitmask_1W = torch.atleast_2d(found)[of_slot : of_slot + 1]  # type: ignore[no-untyped-call]
            if len(bitmask_1W):
                bitmasks[row] = bitmask_1W.to(self._device)
        return bitmasks

    def _edit_rows(
        self,
        logits_SV: torch.Tensor,
        slots_S: Int32Array,
        edited_S: BoolArray,
        excluding_S: BoolArray,
        bitmasks: Mapping[int, torch.Tensor],
    ) -> dict[int, torch.Tensor]:
        """Steps 2 to 5 in place; gives the rows that changed as they were, [1, V] each."""
        original: dict[int, torch.Tensor] = {}
        for row in np.flatnonzero(edited_S).tolist():
            slot = int(slots_S[row])
            logits_1V = logits_SV[row : row + 1]
            original[row] = logits_1V.clone()
            bitmask_1W = bitmasks.get(row)
            stops = self._stops[slot] if excluding_S[row] else None
            self._edit(logits_1V, slot, bitmask_1W, stops)
            if stops is not None and _impossible(logits_1V):
                logits_1V.copy_(original[row])
                self._edit(logits_1V, slot, bitmask_1W, None)
            if _impossible(logits_1V):
                logits_1V.copy_(original[row])
                if bitmask_1W is not None:
                    # Whatever the logits are worth, the text stays what it must be.
                    self._apply_bitmask(logits_1V.zero_(), bitmask_1W)
        return original

    def _edit(
        self,
        logits_1V: torch.Tensor,
        slot: int,
        bitmask_1W: torch.Tensor | None,
        stops: torch.Tensor | None,
    ) -> None:
        logits_V = logits_1V[0]
        if bitmask_1W is not None:
            self._apply_bitmask(logits_1V, bitmask_1W)
        if stops is not None:
            logits_V.index_fill_(0, stops, -torch.inf)
        if slot in self._bias:
            bias = self._bias[slot]
            self._add_bias(logits_V, bias.ids, bias.values)
        if slot in self._history:
            history = self._history[slot]
            params = history.params
            self._penalise(
                logits_V,
                *history.seen(),
                repetition=params.repetition_penalty,
                presence=params.presence_penalty,
                frequency=params.frequency_penalty,
            )

    def _choose(
        self,
        logits_SV: torch.Tensor,
        slots_S: Int32Array,
        positions_S: Int32Array,
        drawn_S: BoolArray,
    ) -> torch.Tensor:
        """Steps 6 to 8. Rows that lie together and are alike go to one kernel call."""
        tokens_S = torch.empty(len(slots_S), dtype=torch.int64, device=logits_SV.device)
        uniforms_S = uniforms(self._seed_X[slots_S], positions_S)
        for start, end in _runs(drawn_S):
            rows = slice(start, end)
            slots = slots_S[rows]
            if not drawn_S[start]:
                tokens_S[rows] = self._argmax(logits_SV[rows])
                continue
            tokens_S[rows] = self._draw(
                logits_SV[rows],
                torch.from_numpy(uniforms_S[rows]),
                temperatures_S=torch.from_numpy(self._temperature_X[slots]),
                top_ks_S=torch.from_numpy(self._top_k_X[slots]),
                top_ps_S=torch.from_numpy(self._top_p_X[slots]),
                min_ps_S=torch.from_numpy(self._min_p_X[slots]),
            )
        return tokens_S

    def _report(
        self,
        logits_SV: torch.Tensor,
        original: dict[int, torch.Tensor],
        slots_S: Int32Array,
        tokens_S: torch.Tensor,
        reports_S: BoolArray,
    ) -> SampledLogprobs | None:
        """Step 1, done last because it needs the token."""
        rows = np.flatnonzero(reports_S)
        if not len(rows):
            return None
        counts = self._top_logprobs_X[slots_S[rows]]
        width = int(counts.max())
        chosen = np.empty(len(rows), dtype=np.float32)
        top_token_ids = np.zeros((len(rows), width), dtype=np.int32)
        top_values = np.zeros((len(rows), width), dtype=np.float32)
        for entry, (row, count) in enumerate(zip(rows.tolist(), counts.tolist(), strict=True)):
            logits_1V = original.get(row, logits_SV[row : row + 1])
            value, ids, values = self._logprobs(logits_1V, tokens_S[row : row + 1], count)
            chosen[entry] = value[0].item()
            top_token_ids[entry, :count] = ids[0].cpu().numpy()
            top_values[entry, :count] = values[0].cpu().numpy()
        return SampledLogprobs(
            sample_indices=rows.astype(np.int32),
            chosen=chosen,
            top_token_ids=top_token_ids,
            top_values=top_values,
            top_counts=counts,
        )

    def _tensor(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def _impossible(logits: torch.Tensor) -> bool:
    """Whether no token can be sampled."""
    peak = logits.max()
    if peak.isnan():
        # NaN hides the others, and does not count.
        return not bool((logits > -torch.inf).any())
    return bool(peak == -torch.inf)


def _runs(flags: BoolArray) -> Iterator[tuple[int, int]]:
    """Start and end of each run of equal flags."""
    edges = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    yield from zip([0, *edges.tolist()], [*edges.tolist(), len(flags)], strict=True)
