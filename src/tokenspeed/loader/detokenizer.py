"""From token ids to text, piece by piece, never cutting a character.

Every token stands for bytes, and the text is those bytes read as UTF-8. So a stream costs the same
per token however long it is, and what it gives is what decoding all ids at once gives.
"""

import codecs
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from tokenspeed.core.errors import UnsupportedModel

__all__ = ["IncrementalDetokenizer", "TokenBytes"]

_SPACE = "\u2581"


class TokenBytes:
    """The bytes each token stands for.

    Args:
        decoder: `decoder` of the tokenizer.json.
        text_of: the vocabulary's text of an id; None for an id that it lacks.
        added: ids of tokens whose text stands for itself.
        special: those of them that are no text to a reader.

    Raises:
        UnsupportedModel: the decoder is neither byte-level nor SentencePiece's.
    """

    def __init__(
        self,
        decoder: Mapping[str, Any] | None,
        *,
        text_of: Callable[[int], str | None],
        added: Mapping[int, str],
        special: frozenset[int],
    ) -> None:
        steps = _steps(decoder)
        kinds = [step.get("type") for step in steps]
        if "ByteLevel" in kinds:
            self._bytes_of = _byte_level
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            self._bytes_of = _sentencepiece
        else:
            raise UnsupportedModel(
                f"the tokenizer decodes with {kinds or 'nothing'}; ByteLevel, and ByteFallback or "
                "Metaspace are handled"
            )
        self.strips_space = any(
            (step.get("type") == "Strip" and step.get("start") == 1)
            or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
        self.special = special
        self._text_of = text_of
        self._added = added
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """The token's bytes; none for an id that the vocabulary lacks."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._compute(token)
        return known

    def _compute(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        text = self._text_of(token) if 0 <= token < 2**32 else None
        return b"" if text is None else self._bytes_of(text)


class IncrementalDetokenizer:
    """The text of a growing list of tokens.

    Args:
        token_bytes: the tokenizer's.
        skip_special: leave out special tokens.
    """

    def __init__(self, token_bytes: TokenBytes, *, skip_special: bool = True) -> None:
        self._token_bytes = token_bytes
        self._hidden = token_bytes.special if skip_special else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = token_bytes.strips_space

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens make certain; a character still incomplete is held back."""
        hidden, token_bytes = self._hidden, self._token_bytes
        shown = [token_bytes[token] for token in token_ids if token not in hidden]
        return self._strip(self._decoder.decode(b"".join(shown)))

    def flush(self) -> str:
        """What is held back, as U+FFFD, at the end of the stream."""
        text = self._strip(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        return text

    def _strip(self, text: str) -> str:
        if not self._at_start or not text:
            return text
        self._at_start = False
        return text.removeprefix(" ")


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's stand-ins: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {chr(byte): byte for byte in printable}
    return stand_ins | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _byte_level(text: str) -> bytes:
    table = _byte_of_character()
    if all(character in table for character in text):
        return bytes(table[character] for character in text)
    return text.encode()


def _sentencepiece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace(_SPACE, " ").encode()
