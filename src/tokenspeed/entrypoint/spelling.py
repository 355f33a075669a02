"""What tokens spell, so that texts can be compared that are cut into different tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenspeed.core.step import Int32Array

__all__ = ["ByteArray", "Spelling", "TokenSpelling"]

ByteArray = npt.NDArray[np.uint8]

# Occurs in no UTF-8 text: what begins with it is one token's name, and never text.
_ESCAPE = 0xFF
_NAME_SIZE_BYTES = 4
# Two million tokens of four bytes each; temporary arrays take eight times that.
_SIZE_MAX_BYTES = 8 * 1024 * 1024


class Spelling:
    """The bytes of some tokens, and where each token ends.

    Attributes:
        text: [B] uint8. Control tokens, and tokens without a text, are a byte that is in no text
            and the token's number, so that two spellings are equal exactly where text and
            control tokens both are.
        ends: [T] int32, ascending strictly: the end of each token in `text`.
    """

    __slots__ = ("ends", "text")

    def __init__(self, text: ByteArray, ends: Int32Array) -> None:
        self.text = text
        self.ends = ends


class TokenSpelling:
    """Spells tokens. Each is looked up once, when it first comes.

    Args:
        bytes_of: a token's bytes; none for one that stands for nothing.
        control: tokens that are never text, whatever their bytes are.
        vocab_size: ids are below it.
    """

    def __init__(
        self, bytes_of: Callable[[int], bytes], *, control: frozenset[int], vocab_size: int
    ) -> None:
        self._bytes_of = bytes_of
        self._control = control
        self._starts = np.zeros(vocab_size, np.int32)
        self._sizes = np.zeros(vocab_size, np.int32)
        self._pool = np.zeros(1 << 16, np.uint8)
        self._used = 0

    def spell(self, ids: npt.NDArray[np.integer[Any]]) -> Spelling | None:
        """The spelling of ids [T]; None for one of too many bytes, or with an id that is none."""
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self._sizes)):
            return None
        sizes = self._sizes[ids]
        if not sizes.all():
            self._learn(ids[sizes == 0])
            sizes = self._sizes[ids]
        if (total := int(sizes.sum(dtype=np.int64))) > _SIZE_MAX_BYTES:
            return None
        ends = np.cumsum(sizes, dtype=np.int32)
        places = np.repeat(self._starts[ids] + sizes - ends, sizes)
        places += np.arange(total, dtype=np.int32)
        return Spelling(self._pool[places], ends)

    def _learn(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        for token in np.unique(ids).tolist():
            name = self._spell_one(token)
            if self._used + len(name) > len(self._pool):
                self._pool = np.resize(self._pool, 2 * len(self._pool) + len(name))
            self._pool[self._used : self._used + len(name)] = np.frombuffer(name, np.uint8)
            self._starts[token] = self._used
            self._sizes[token] = len(name)
            self._used += len(name)

    def _spell_one(self, token: int) -> bytes:
        text = b"" if token in self._control else self._bytes_of(token)
        if text and _ESCAPE not in text:
            return text
        return bytes([_ESCAPE]) + token.to_bytes(_NAME_SIZE_BYTES, "big")
