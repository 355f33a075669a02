"""A model's tokens without a model: every byte, some longer texts, two ends and a special one."""

import select

import numpy as np

from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.grammar import CompiledConstraint, ConstraintCompiler, Grammar, TokenTable
from tokenspeed.grammar.tokens import longest_match, native_tokens
from tokenspeed.grammar.translation import grammar_of

__all__ = [
    "ENDS",
    "SLOW",
    "SPECIAL",
    "TABLE",
    "V",
    "compiler",
    "grammar",
    "next_of",
    "takes",
    "wait",
]

_WORDS = (
    '{"',
    '":',
    '",',
    " ",
    "true",
    "null",
    "foo",
    "bar",
    "  ",
    "日",
    "é",
    "ab",
    "12",
    "<tool>",
)
_WORDS_B = [word.encode() for word in _WORDS] + ["日本".encode()[:4], "🙂".encode()[1:]]
# The last ones stand for nothing, as where logits are padded.
_TEXTS = [bytes([byte]) for byte in range(256)] + _WORDS_B + [b"</s>", b"<|im_end|>", b"<|t|>"]
V = len(_TEXTS) + 5
ENDS = (len(_TEXTS) - 3, len(_TEXTS) - 2)
SPECIAL = (*ENDS, len(_TEXTS) - 1)
TABLE = TokenTable(texts=[*_TEXTS, *[b""] * 5], special=list(SPECIAL), ends=list(ENDS))

# Takes the converter of grammars tens of seconds.
SLOW = StructuredOutputs(
    grammar="root ::= r0\n"
    + "".join(f'r{n} ::= "a" r{n + 1} | r{n + 1}\n' for n in range(20_000))
    + 'r20000 ::= "b"'
)


def compiler(**limits: int) -> ConstraintCompiler:
    """Compiles for this table."""
    return ConstraintCompiler(lambda: TABLE, longest_match(TABLE), **limits)


def wait(subject: ConstraintCompiler, timeout_s: float = 60) -> list[CompiledConstraint]:
    """What becomes ready next."""
    while not (ready := subject.take()):
        assert select.select([subject.descriptor], [], [], timeout_s)[0], "nothing became ready"
    return ready


def grammar(constraint: StructuredOutputs, table: TokenTable = TABLE) -> Grammar:
    """Compiled here and now."""
    special = frozenset(table.texts[token].decode() for token in table.special)
    text = grammar_of(constraint.kind, constraint.text, special=special)
    return Grammar(native_tokens(table, longest_match(table)), text)


def next_of(matcher) -> set[int]:  # type: ignore[no-untyped-def]
    """The tokens that may come next."""
    bits = np.zeros((V + 31) // 32, dtype=np.int32)
    matcher.fill(bits)
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())


def takes(compiled: Grammar, tokens: list[int]) -> bool:
    """Whether each token may come, and then an end."""
    matcher = compiled.matcher()
    for token in tokens:
        if token not in next_of(matcher):
            return False
        matcher.take([token])
    return next_of(matcher).issuperset(ENDS)
