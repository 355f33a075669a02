"""One constraint, tried out: translated, compiled, and followed for some tokens."""

import time

import llguidance
import numpy as np

from tokenspeed.core.constraint import ConstraintKind
from tokenspeed.core.errors import InvalidParameter
from tokenspeed.grammar.matcher import Grammar
from tokenspeed.grammar.tokens import TokenTable
from tokenspeed.grammar.translation import grammar_of

__all__ = ["MASK_TIME_MAX_S", "tried"]

MASK_TIME_MAX_S = 0.05
"""CPU seconds of the slowest mask that is taken: every request of the batch waits for it. Masks of
everyday schemas take a thousandth of it."""

_WALKS = 3
_STEPS = 48
_REFUSAL_CHARS_MAX = 400


def tried(
    kind: ConstraintKind, text: str, *, table: TokenTable, tokens: llguidance.LLTokenizer
) -> str:
    """The grammar of a constraint that an engine can follow.

    Raises:
        InvalidParameter: says what is wrong with it, in few words.
    """
    special = frozenset(table.texts[token].decode(errors="replace") for token in table.special)
    try:
        grammar = grammar_of(kind, text, special=special)
        compiled = Grammar(tokens, grammar)
        for walk in range(_WALKS):
            _walk(compiled, table, np.random.default_rng(walk))
    except InvalidParameter as error:
        raise InvalidParameter(_shortened(str(error))) from None
    return grammar


def _walk(grammar: Grammar, table: TokenTable, choose: np.random.Generator) -> None:
    """Follow the grammar along tokens of no meaning, for as long as it goes on."""
    matcher = grammar.matcher()
    bits_W = np.zeros((len(table.texts) + 31) // 32, dtype=np.int32)
    for _ in range(_STEPS):
        begin_s = time.thread_time()
        matcher.fill(bits_W)
        took_s = time.thread_time() - begin_s
        if took_s > MASK_TIME_MAX_S:
            raise InvalidParameter(
                f"it is too complex: to find out which tokens may come next took "
                f"{took_s * 1e3:.0f} ms, and {MASK_TIME_MAX_S * 1e3:.0f} ms are the most"
            )
        flags = np.unpackbits(bits_W.view(np.uint8), bitorder="little")
        flags[table.ends] = 0
        going_on = np.flatnonzero(flags)
        if not len(going_on):
            return
        matcher.take([int(going_on[choose.integers(len(going_on))])])


def _shortened(text: str) -> str:
    """The words of a message, without drawings of where it went wrong, and not all of a schema."""
    words = " ".join(text.replace("<non-verbose/>", "").split())
    if words.startswith("NoExtension"):
        return "no text satisfies it"
    if words.startswith(("LexerTooComplex", "ParserTooComplex")):
        words = f"it is too complex ({words})"
    return words if len(words) <= _REFUSAL_CHARS_MAX else f"{words[:_REFUSAL_CHARS_MAX]} ..."
