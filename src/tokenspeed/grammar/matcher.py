"""Compiled grammars, and places in texts under them."""

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tokenspeed.core.errors import InvalidParameter

# The library is imported with the first grammar: an engine that constrains nothing does without.
if TYPE_CHECKING:
    import llguidance

__all__ = ["Grammar", "Matcher"]


class Matcher:
    """A place in a text under a grammar. Not thread-safe; made by `Grammar.matcher`."""

    def __init__(self, native: "llguidance.LLMatcher") -> None:
        self._native = native

    def take(self, tokens: list[int]) -> None:
        """Go on by tokens.

        Raises:
            InvalidParameter: the grammar does not take one of them, or following it became too
                much work.
        """
        if tokens and not self._native.consume_tokens(tokens):
            raise InvalidParameter(self._native.get_error())

    def fill(self, bitmask_W: npt.NDArray[np.int32]) -> None:
        """Write which tokens may come next: bit v % 32 of word v // 32 for token v. Other threads
        run meanwhile.

        Raises:
            InvalidParameter: no token may come, or the mask would be too much work.
        """
        self._native.unsafe_compute_mask_ptr(bitmask_W.ctypes.data, bitmask_W.nbytes)
        if self._native.is_error():
            raise InvalidParameter(self._native.get_error())
        if not bitmask_W.any():
            raise InvalidParameter("no token continues a text that satisfies it")

    def taken(self, tokens: list[int]) -> int:
        """How many of the tokens may come next, one after the other; the place stays."""
        # Of a copy, since what becomes too much work on the way is no concern of this text's.
        return self._native.deep_copy().validate_tokens(tokens)

    def copy(self) -> "Matcher":
        """The same place in the same text, to go on from in another way."""
        return Matcher(self._native.deep_copy())

    @property
    def complete(self) -> bool:
        """Whether the text satisfies the grammar as it stands."""
        return bool(self._native.is_accepting())


class Grammar:
    """A compiled grammar.

    Args:
        tokens: of the model.
        text: as the library reads grammars.

    Attributes:
        ends: tokens that end a text, allowed where it may end.

    Raises:
        InvalidParameter: names what the library does not take.
    """

    def __init__(self, tokens: "llguidance.LLTokenizer", text: str) -> None:
        import llguidance  # noqa: PLC0415

        self._native = llguidance.LLMatcher(tokens, text, log_level=0, limits=_limits())
        if self._native.is_error():
            raise InvalidParameter(self._native.get_error())
        self.ends: tuple[int, ...] = tuple(tokens.eos_tokens)

    def matcher(self) -> Matcher:
        """The beginning of a text. What is learned along one text speeds up all."""
        return Matcher(self._native.deep_copy())


@cache
def _limits() -> "llguidance.LLParserLimits":
    """The library counts its work, so that what is too much is so on any machine and at any load.
    The greatest mask of an everyday schema takes a fiftieth of these."""
    import llguidance  # noqa: PLC0415

    return llguidance.LLParserLimits(
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )
