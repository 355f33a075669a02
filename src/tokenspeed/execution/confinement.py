"""The requests whose text must follow a grammar, by slot: which tokens each may get next.

A thread of its own follows the grammars. It begins with a request's next bitmask as soon as a token
is sampled, or the slot is bound, and so has it ready, as a rule long before the forward that needs
it ends. The tokens never leave this side of the plan: with steps launched ahead it is the same.

Legend: X slots, S sampled rows, W 32-bit words of a bit for each token.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.core.errors import InvalidParameter
from tokenspeed.core.step import Int32Array
from tokenspeed.grammar import Grammar, Matcher, deep_stacks

__all__ = ["Confinement"]


class Gates(Protocol):
    """Whoever samples, and waits for what a slot may get."""

    def expect(self, slot: int) -> None:
        """Have the slot's next token wait until `allow` says which it may be."""

    def allow(self, slot: int, bitmask_W: torch.Tensor | None) -> None:
        """Say which it may be, int32 [W] a bit for each token; None for any."""


class _Confined:
    """A request's place in its text, and the bitmask of its next token."""

    def __init__(
        self,
        grammar: Grammar,
        bitmask_W: Int32Array,
        *,
        ends: frozenset[int],
        put_off_W: Int32Array | None,
    ) -> None:
        self._grammar = grammar
        self._matcher: Matcher | None = None
        self._bitmask_W = bitmask_W
        self._put_off_W = put_off_W
        self.ends = ends
        self.ready: Future[None] = Future()

    def follow(self, tokens: list[int]) -> None:
        """Go on by tokens and find out what may come next."""
        if self._matcher is None:
            self._matcher = self._grammar.matcher()
        self._matcher.take(tokens)
        self._matcher.fill(self._bitmask_W)
        if self._put_off_W is not None:
            going_on_W = self._bitmask_W & ~self._put_off_W
            if going_on_W.any():
                self._bitmask_W[:] = going_on_W


class Confinement:
    """Which tokens the requests with a grammar may get next.

    Args:
        slots_max: X.
        vocabulary: tokens that logits have.
        gates: of the sampler.
    """

    def __init__(self, *, slots_max: int, vocabulary: int, gates: Gates) -> None:
        self._slots_max = slots_max
        self._words = (vocabulary + 31) // 32
        self._gates = gates
        self._confined: dict[int, _Confined] = {}
        # Both come with the first grammar.
        self._bitmask_XW: torch.Tensor | None = None
        self._thread: ThreadPoolExecutor | None = None

    def bind(
        self,
        slot: int,
        grammar: Grammar | None,
        *,
        output: list[int],
        ends: Int32Array,
        ignore_eos: bool,
    ) -> None:
        """Give a slot to a request; the one that had it is forgotten.

        Args:
            slot: below `slots_max`.
            grammar: what its output follows; None lets it be anything.
            output: its tokens so far.
            ends: tokens that end it.
            ignore_eos: it ends only where the grammar lets it do nothing else.
        """
        before = self._confined.pop(slot, None)
        if before is not None:
            # It writes where the new one's bitmask will be, and says so.
            before.ready.exception()
            self._gates.allow(slot, None)
        if grammar is None:
            return
        if self._bitmask_XW is None:
            self._bitmask_XW = torch.zeros((self._slots_max, self._words), dtype=torch.int32)
            self._thread = ThreadPoolExecutor(1, "bitmasks")
            with deep_stacks():
                self._thread.submit(int).result()
        confined = _Confined(
            grammar,
            self._bitmask_XW[slot].numpy(),
            ends=frozenset(ends.tolist()),
            put_off_W=self._bits(grammar.ends) if ignore_eos else None,
        )
        self._confined[slot] = confined
        self._begin(slot, confined, output)

    def free(self, slots_S: Int32Array) -> bool:
        """Whether none of the slots has a grammar."""
        return self._confined.keys().isdisjoint(slots_S.tolist())

    def held(self, slots_S: Int32Array) -> npt.NDArray[np.bool_]:
        """Which of the slots have a grammar."""
        if not self._confined:
            return np.zeros(len(slots_S), dtype=np.bool_)
        return np.isin(slots_S, list(self._confined))

    def failures(self, slots_S: Int32Array) -> dict[int, str]:
        """Slots of a step just sampled whose grammar cannot be followed any further, and why."""
        failures: dict[int, str] = {}
        for slot in slots_S.tolist() if self._confined else ():
            confined = self._confined.get(slot)
            try:
                if confined is not None:
                    confined.ready.result()
            except InvalidParameter as error:
                failures[slot] = str(error)
        return failures

    def advance(self, slots_S: Int32Array, tokens_S: Int32Array) -> npt.NDArray[np.bool_]:
        """Begin with the bitmasks that follow the tokens just sampled.

        Returns:
            Of each, whether a token may follow.
        """
        going_on_S = np.ones(len(slots_S), dtype=np.bool_)
        if not self._confined:
            return going_on_S
        for sample, (slot, token) in enumerate(
            zip(slots_S.tolist(), tokens_S.tolist(), strict=True)
        ):
            confined = self._confined.get(slot)
            if confined is None:
                continue
            # A token that ends the request has none after it, nor has one that has failed.
            if token in confined.ends or confined.ready.exception() is not None:
                going_on_S[sample] = False
            else:
                self._begin(slot, confined, [token])
        return going_on_S

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _bits(self, tokens: Sequence[int]) -> Int32Array:
        flags = np.zeros(self._words * 32, dtype=np.bool_)
        flags[list(tokens)] = True
        return np.packbits(flags, bitorder="little").view(np.int32)

    def _begin(self, slot: int, confined: _Confined, tokens: list[int]) -> None:
        assert self._thread is not None
        self._gates.expect(slot)
        confined.ready = self._thread.submit(self._follow, slot, confined, tokens)

    def _follow(self, slot: int, confined: _Confined, tokens: list[int]) -> None:
        assert self._bitmask_XW is not None
        bitmask_W: torch.Tensor | None = None
        try:
            confined.follow(tokens)
            bitmask_W = self._bitmask_XW[slot]
        finally:
            # Tokens of a request that failed mean nothing, but its step must not wait for them.
            self._gates.allow(slot, bitmask_W)
