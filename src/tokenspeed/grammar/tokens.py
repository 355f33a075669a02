"""The tokens that grammars are matched against."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tokenspeed.core.records import Record

# The library is imported with the first constraint: an engine that has none does without.
if TYPE_CHECKING:
    import llguidance

__all__ = ["TokenTable", "longest_match", "native_tokens"]


class TokenTable(Record, frozen=True, kw_only=True, array_like=True):
    """A model's tokens.

    Attributes:
        texts: the bytes of each token that logits have; none for one that stands for nothing.
        special: tokens that are no text: a constraint can name them, and no text matches them.
        ends: tokens that end a text.
    """

    texts: list[bytes]
    special: list[int]
    ends: list[int]


def native_tokens(
    table: TokenTable, encode: Callable[[bytes], Sequence[int]]
) -> "llguidance.LLTokenizer":
    """The library's own form of a table: a tree of all tokens. Takes some tenths of a second.

    Args:
        table: with at least one end.
        encode: text to tokens. Where a grammar leaves a text no choice, these are its tokens.
    """
    import llguidance  # noqa: PLC0415

    # It asks for this attribute, and takes only its own wrapper of whatever has them.
    wrapper = llguidance.TokenizerWrapper(_Tokens(table, encode))
    return llguidance.LLTokenizer(wrapper, eos_token=table.ends)


class _Tokens:
    """A table, with the names that the library knows."""

    def __init__(self, table: TokenTable, encode: Callable[[bytes], Sequence[int]]) -> None:
        self.eos_token_id = table.ends[0]
        self.bos_token_id = None
        self.tokens = table.texts
        self.special_token_ids = table.special
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        return list(self._encode(text))


def longest_match(table: TokenTable) -> Callable[[bytes], list[int]]:
    """Text to tokens where the tokenizer is not at hand: always the longest that fits."""
    tokens: dict[bytes, int] = {}

    def encode(text: bytes) -> list[int]:
        if not tokens:
            special = set(table.special)
            for token, entry in enumerate(table.texts):
                if entry and token not in special:
                    tokens.setdefault(entry, token)
        longest = max(map(len, tokens), default=1)
        found, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + longest), at, -1)
            end = next((end for end in ends if text[at:end] in tokens), None)
            if end is not None:
                found.append(tokens[text[at:end]])
            at = end or at + 1
        return found

    return encode
