"""The requests whose text must follow a grammar, by slot: which tokens each may get next.

A thread of its own follows the grammars. It begins with a request's next bitmask as soon as a token
is sampled, or the slot is bound, and so has it ready, as a rule long before the forward that needs
it ends. The tokens never leave this side of the plan: with steps launched ahead it is the same.
Where a step has guesses of the tokens to come, the bitmasks behind these are made while it runs.

Legend: X slots, S sampled rows, J samples of a slot, W 32-bit words of a bit for each token.
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

    def allow(self, slot: int, bitmasks: torch.Tensor | None) -> None:
        """Say which it may be, int32 [W] a bit for each token; or [J, W] for the slot's samples of
        a step; None for any."""


class _Confined:
    """A request's place in its text, and the bitmask of its next token.

    Attributes:
        ends: tokens that end the request.
        ready: done when the bitmasks of its next step are there.
        foreseen: how many of that step's samples have a bitmask; one behind those counts only if
            it is behind the request's end, or else the grammar could not be followed so far.
        broken: why it could not.
    """

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
        self.foreseen = 1
        self.broken: str | None = None

    def follow(self, tokens: list[int]) -> None:
        """Go on by tokens and find out what may come next."""
        if self._matcher is None:
            self._matcher = self._grammar.matcher()
        self._matcher.take(tokens)
        self._fill(self._matcher, self._bitmask_W)
        self.foreseen, self.broken = 1, None

    def taken(self, guesses: list[int]) -> int:
        """How many guesses of what comes next the grammar takes, once `ready`."""
        assert self._matcher is not None
        return self._matcher.taken(guesses)

    def foresee(self, guesses: list[int], bitmasks_JW: Int32Array) -> None:
        """Find out what may come next, and behind each of the guesses."""
        assert self._matcher is not None
        bitmasks_JW[0] = self._bitmask_W
        matcher = self._matcher.copy()
        for guess in guesses:
            if guess in self.ends:
                # Nothing counts behind it.
                break
            try:
                matcher.take([guess])
                self._fill(matcher, bitmasks_JW[self.foreseen])
            except InvalidParameter as error:
                self.broken = str(error)
                break
            self.foreseen += 1

    def _fill(self, matcher: Matcher, bitmask_W: Int32Array) -> None:
        matcher.fill(bitmask_W)
        if self._put_off_W is not None:
            going_on_W = bitmask_W & ~self._put_off_W
            if going_on_W.any():
                bitmask_W[:] = going_on_W


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

    @property
    def idle(self) -> bool:
        """Whether no slot has a grammar."""
        return not self._confined

    def free(self, slots_S: Int32Array) -> bool:
        """Whether none of the slots has a grammar."""
        return self._confined.keys().isdisjoint(slots_S.tolist())

    def taken(self, slot: int, guesses: list[int]) -> int:
        """How many guesses of what a slot gets next may come, one after the other: all of them
        where it has no grammar."""
        confined = self._confined.get(slot)
        if confined is None or confined.ready.exception() is not None:
            return len(guesses)
        return confined.taken(guesses)

    def foresee(self, slot: int, guesses: list[int]) -> None:
        """Begin with the bitmasks behind guesses of what a slot gets in the next step."""
        confined = self._confined.get(slot)
        if confined is None or confined.ready.exception() is not None:
            return
        assert self._thread is not None
        self._gates.expect(slot)
        confined.ready = self._thread.submit(self._foresee, slot, confined, guesses)

    def advance(
        self, slots_S: Int32Array, tokens_S: Int32Array
    ) -> tuple[npt.NDArray[np.bool_], dict[int, str]]:
        """Begin with the bitmasks that follow the tokens just sampled.

        Args:
            slots_S: the tokens of a slot stand together, in their order.
            tokens_S: those that count.

        Returns:
            Of each, whether a token may follow; and the slots whose grammar cannot be followed any
            further, and why: their tokens mean nothing.
        """
        going_on_S = np.ones(len(slots_S), dtype=np.bool_)
        failures: dict[int, str] = {}
        if not self._confined:
            return going_on_S, failures
        sampled: dict[int, list[int]] = {}
        for slot, token in zip(slots_S.tolist(), tokens_S.tolist(), strict=True):
            if slot in self._confined:
                sampled.setdefault(slot, []).append(token)
        for slot, tokens in sampled.items():
            confined = self._confined[slot]
            failure = self._failure(confined, len(tokens))
            if failure is not None:
                failures[slot] = failure
            # A token that ends the request has none after it, nor has one that has failed.
            if failure is not None or not confined.ends.isdisjoint(tokens):
                going_on_S[slots_S == slot] = False
            else:
                self._begin(slot, confined, tokens)
        return going_on_S, failures

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _failure(self, confined: _Confined, tokens: int) -> str | None:
        """Why so many tokens could not be sampled, if they could not."""
        try:
            confined.ready.result()
        except InvalidParameter as error:
            return str(error)
        return confined.broken if tokens > confined.foreseen else None

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

    def _foresee(self, slot: int, confined: _Confined, guesses: list[int]) -> None:
        bitmasks_JW = torch.empty((1 + len(guesses), self._words), dtype=torch.int32)
        try:
            confined.foresee(guesses, bitmasks_JW.numpy())
        finally:
            self._gates.allow(slot, bitmasks_JW[: confined.foreseen])
