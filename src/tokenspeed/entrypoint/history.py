"""Which tokens a text was served as, so that it is served as the same ones when it comes back.

A gateway renders and encodes a conversation anew each turn. What the model wrote comes back as the
tokenizer's own tokens for those bytes, which need not be the sampled ones, and the prefix cache,
which goes by tokens, would miss from the first difference on. Here served sequences (prompt and
answer) are kept, and a prompt whose text begins as one of them does begins with its tokens too.

Sequences are found by chained hashes of blocks of their text. A hash that lies costs reuse and
never correctness, since texts are compared themselves. Every pass is linear in the prompt, in
numpy or over whole blocks, whatever the prompt is.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import Int32Array
from tokenspeed.engine.facts import EngineInfo
from tokenspeed.entrypoint.spelling import ByteArray, Spelling, TokenSpelling

__all__ = [
    "BLOCK_SIZE_BYTES",
    "HISTORY_SIZE_MAX_BYTES",
    "HistoryStats",
    "Prompt",
    "TokenHistory",
    "served_tokens_max",
]

_log = logging.getLogger(__name__)

TokenIds = npt.NDArray[np.integer[Any]]

BLOCK_SIZE_BYTES = 128
"""Texts are told apart by whole blocks, of about a page of tokens."""

HISTORY_SIZE_MAX_BYTES = 128 * 1024 * 1024
"""A conversation of 50K tokens takes 0.8 MB, a thousandth of its KV: what the device still has
cached is remembered too."""

# What a block adds to the index: its hash, and the places in a list and a table that hold it.
_BLOCK_OVERHEAD_BYTES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryStats:
    """What is remembered, and what came of it since the engine started.

    Attributes:
        sequences, size_bytes: what is remembered now.
        prompts: prompts of which a part was served as other tokens than they came as.
        replaced_tokens: tokens of those prompts in whose place others were served.
        forgotten: sequences that had to make room for others.
    """

    sequences: int
    size_bytes: int
    prompts: int
    replaced_tokens: int
    forgotten: int


@dataclass(frozen=True, slots=True, eq=False)
class _Remembered:
    """A sequence that was served; `hashes` are those of the blocks of its text, chained."""

    tenant: str | None
    ids: Int32Array
    spelling: Spelling
    hashes: list[int]

    @property
    def size_bytes(self) -> int:
        arrays = self.ids.nbytes + self.spelling.text.nbytes + self.spelling.ends.nbytes
        return arrays + _BLOCK_OVERHEAD_BYTES * len(self.hashes)


@dataclass(slots=True)
class _Tenant:
    """What one tenant's requests left behind, least recently used first."""

    index: dict[int, _Remembered]
    sequences: dict[_Remembered, None]
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Match:
    """The tokens `sent` of a prompt spell what the tokens `served` of a sequence spell."""

    sent_ends: Int32Array
    served_ends: Int32Array


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it came, and as it is served. Made by `TokenHistory.recall`, or of tokens alone.

    Attributes:
        ids: [T] int32, the tokens to serve; the tokens as they came where they cannot be spelled.
        sent_tokens: how many tokens it came as, which is what its sender can count.
        replaced_tokens: in place of how many of them others are served.
    """

    ids: TokenIds
    sent_tokens: int
    replaced_tokens: int = 0
    _tenant: str | None = None
    _spelling: Spelling | None = None
    _hashes: tuple[int, ...] = ()
    _source: _Remembered | None = None
    _match: _Match | None = None

    def in_sent_tokens(self, served: int) -> int:
        """How many tokens, as they came, lie whole in the first `served` of those served."""
        match = self._match
        if match is None or served == 0:
            return served
        if served >= len(match.served_ends):
            return served - len(match.served_ends) + len(match.sent_ends)
        end = match.served_ends[served - 1]
        return int(np.searchsorted(match.sent_ends, end, side="right"))


class TokenHistory:
    """Remembers what was served, within a bound, apart for each tenant.

    Args:
        spelling: what the model's tokens spell.
        size_max_bytes: of everything remembered. Where it is reached, a tenant that has more than
            an even share makes room itself; else whatever was used least recently goes.
        block_size_bytes: of the blocks by which texts are found.
    """

    def __init__(
        self,
        spelling: TokenSpelling,
        *,
        size_max_bytes: int = HISTORY_SIZE_MAX_BYTES,
        block_size_bytes: int = BLOCK_SIZE_BYTES,
    ) -> None:
        self._token_spelling = spelling
        self._size_max_bytes = size_max_bytes
        self._block_size_bytes = block_size_bytes
        self._tenants: dict[str | None, _Tenant] = {}
        # All sequences of all tenants, least recently used first.
        self._sequences: dict[_Remembered, None] = {}
        self._size_bytes = 0
        self._prompts = 0
        self._replaced_tokens = 0
        self._forgotten = 0

    @property
    def stats(self) -> HistoryStats:
        """What is remembered, and what came of it."""
        return HistoryStats(
            sequences=len(self._sequences),
            size_bytes=self._size_bytes,
            prompts=self._prompts,
            replaced_tokens=self._replaced_tokens,
            forgotten=self._forgotten,
        )

    def recall(self, ids: TokenIds, *, tenant: str | None, tokens_max: int) -> Prompt:
        """A prompt with the tokens that the beginning of its text was served as.

        The result spells what `ids` spell: control tokens are the same, text is the same byte for
        byte. It is as it came where nothing fits.

        Args:
            ids: [T] token ids.
            tenant: only what was served to the same tenant counts.
            tokens_max: a prompt that would grow beyond this stays as it came.
        """
        spelling = self._token_spelling.spell(ids)
        if spelling is None:
            return Prompt(ids, len(ids))
        ids = ids.astype(np.int32)
        hashes = tuple(_chained(spelling.text, self._block_size_bytes))
        source = self._find(tenant, hashes)
        as_it_came = Prompt(ids, len(ids), 0, tenant, spelling, hashes, source)
        if source is None:
            return as_it_came
        self._touch(source)
        sent, served, replaced = _meeting(ids, spelling, source)
        length = served + len(ids) - sent
        if not replaced or length > max(tokens_max, len(ids)):
            return as_it_came
        self._prompts += 1
        self._replaced_tokens += replaced
        _log.debug("%d of %d prompt tokens are served as they were before", replaced, len(ids))
        sent_ends, served_ends = spelling.ends[:sent], source.spelling.ends[:served]
        return Prompt(
            np.concatenate((source.ids[:served], ids[sent:])),
            len(ids),
            replaced,
            tenant,
            Spelling(spelling.text, np.concatenate((served_ends, spelling.ends[sent:]))),
            hashes,
            source,
            _Match(sent_ends, served_ends),
        )

    def remember(self, prompt: Prompt, answer: Sequence[int]) -> None:
        """Keep what was served: a prompt, and the tokens that were sampled after it."""
        before = prompt._spelling
        after = self._token_spelling.spell(np.array(answer, dtype=np.int64))
        if before is None or after is None or not answer:
            return
        text = np.concatenate((before.text, after.text))
        ends = np.concatenate((before.ends, after.ends + np.int32(len(before.text))))
        ids = np.concatenate((prompt.ids, answer), dtype=np.int32, casting="same_kind")
        known = prompt._hashes
        hashes = [*known, *_chained(text, self._block_size_bytes, known)]
        sequence = _Remembered(prompt._tenant, ids, Spelling(text, ends), hashes)
        if not hashes or sequence.size_bytes > self._size_max_bytes:
            return
        old = prompt._source
        if old is not None and old in self._sequences:
            common = _common_bytes(text, old.spelling.text)
            if common == len(text):
                self._touch(old)
                return
            if len(old.spelling.text) - common < self._block_size_bytes:
                # The conversation went on; nothing that can be found is lost with its last turn.
                self._forget(old)
        self._keep(sequence)

    def clear(self) -> None:
        """Forget everything."""
        self._tenants.clear()
        self._sequences.clear()
        self._size_bytes = 0

    def _find(self, tenant: str | None, hashes: Sequence[int]) -> _Remembered | None:
        """Of one tenant's sequences the one that agrees for the most blocks, the latest of such."""
        owner = self._tenants.get(tenant)
        if owner is None:
            return None
        return next((owner.index[name] for name in reversed(hashes) if name in owner.index), None)

    def _touch(self, sequence: _Remembered) -> None:
        for order in (self._sequences, self._tenants[sequence.tenant].sequences):
            del order[sequence]
            order[sequence] = None

    def _keep(self, sequence: _Remembered) -> None:
        owner = self._tenants.setdefault(sequence.tenant, _Tenant({}, {}))
        owner.sequences[sequence] = self._sequences[sequence] = None
        owner.index.update(dict.fromkeys(sequence.hashes, sequence))
        owner.size_bytes += sequence.size_bytes
        self._size_bytes += sequence.size_bytes
        while self._size_bytes > self._size_max_bytes:
            oldest = next(iter(owner.sequences))
            if owner.size_bytes * len(self._tenants) <= self._size_max_bytes or oldest is sequence:
                oldest = next(iter(self._sequences))
            self._forget(oldest)
            self._forgotten += 1

    def _forget(self, sequence: _Remembered) -> None:
        owner = self._tenants[sequence.tenant]
        for name in sequence.hashes:
            if owner.index.get(name) is sequence:
                del owner.index[name]
        del owner.sequences[sequence], self._sequences[sequence]
        owner.size_bytes -= sequence.size_bytes
        self._size_bytes -= sequence.size_bytes
        if not owner.sequences:
            del self._tenants[sequence.tenant]


def served_tokens_max(sent_tokens: int, params: SamplingParams, info: EngineInfo) -> int:
    """How long a prompt that came as so many tokens may be when it is served.

    The answer that was asked for still has its room then; one that may fill the context keeps nine
    tenths of it.
    """
    limit = min(info.context_max, info.pages * info.page_size)
    room = max(limit - sent_tokens, 1)
    asked = room if params.max_new_tokens is None else params.max_new_tokens
    return limit - max(1, params.min_new_tokens, min(asked, room * 9 // 10))


def _chained(text: ByteArray, size: int, known: Sequence[int] = ()) -> list[int]:
    """The hashes of a text's whole blocks, each with all before it, from behind the known ones."""
    rest = text[len(known) * size :].tobytes()
    value, found = known[-1] if known else 0, []
    for begin in range(0, len(rest) - size + 1, size):
        value = hash((value, rest[begin : begin + size]))
        found.append(value)
    return found


def _common_bytes(one: ByteArray, other: ByteArray) -> int:
    """How many bytes two texts begin with alike."""
    shorter = min(len(one), len(other))
    differs = one[:shorter] != other[:shorter]
    first = int(differs.argmax()) if shorter else 0
    return first if shorter and differs[first] else shorter


def _meeting(ids: TokenIds, spelling: Spelling, other: _Remembered) -> tuple[int, int, int]:
    """Where a prompt and a sequence last meet, as long as their texts agree.

    Returns:
        How many tokens of each spell the same, the most that do, and in place of how many of the
        prompt's the sequence has others.
    """
    common = _common_bytes(spelling.text, other.spelling.text)
    served_ends = other.spelling.ends
    within = int(np.searchsorted(served_ends, common, side="right"))
    # By the byte that a token ends before: the sequence's token, plus one; 0 where none ends.
    ending = np.zeros(common + 1, np.int32)
    ending[served_ends[:within]] = other.ids[:within] + 1
    met = ending[spelling.ends[: np.searchsorted(spelling.ends, common, side="right")]]
    if not met.any():
        return 0, 0, 0
    sent = int(np.flatnonzero(met)[-1]) + 1
    served = int(np.searchsorted(served_ends, spelling.ends[sent - 1])) + 1
    # A token that ends where the same one ends begins where it begins.
    same = np.count_nonzero(met[:sent] == ids[:sent] + 1)
    return sent, served, sent - int(same)
