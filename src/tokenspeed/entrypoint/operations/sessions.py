"""Which requests belong to one conversation, told from their prompts alone."""

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenspeed.entrypoint.history import TokenIds

__all__ = ["SessionIndex"]

# A turn repeats the prompt of the last one up to what opened the answer, which templates may
# render otherwise once the answer is history: four tokens at least, eight with an empty thought.
# Of a short prompt eight would be all that tells it from others.
_OPENING_TOKENS_MIN, _OPENING_TOKENS_MAX, _OPENING_SHARE = 4, 8, 16
_DIGEST_BYTES = 16


class SessionIndex:
    """Gives the requests of a conversation one number.

    A request goes on from the request of the same tenant whose prompt, less the last few tokens,
    begins its own; of several, from the longest. Nothing of a prompt is kept but a digest, and a
    request costs one pass over its own prompt, however many sessions there are.

    Args:
        sessions_max: so many are remembered; whichever spoke least of late is forgotten.
    """

    def __init__(self, sessions_max: int) -> None:
        self._sessions_max = sessions_max
        self._numbers = 0
        # (length, digest) of the beginning that the next turn will repeat, by session.
        self._ends: OrderedDict[int, tuple[int, bytes]] = OrderedDict()

    def take(self, prompt: "TokenIds", tenant: str | None) -> tuple[int, int | None]:
        """The session of a request, and the one that was forgotten for it, if any."""
        opening = max(_OPENING_TOKENS_MIN, min(_OPENING_TOKENS_MAX, len(prompt) // _OPENING_SHARE))
        own_end = max(1, len(prompt) - opening)
        lengths = {length for length, _ in self._ends.values() if length <= len(prompt)}
        digests = _digests(
            prompt, sorted(lengths | {own_end}), b"" if tenant is None else tenant.encode()
        )
        found = None
        longest = 0
        for session, (length, digest) in self._ends.items():
            if length > longest and digests.get(length) == digest:
                found, longest = session, length
        forgotten = None
        if found is None:
            self._numbers += 1
            found = self._numbers
            if len(self._ends) == self._sessions_max:
                forgotten, _ = self._ends.popitem(last=False)
        self._ends[found] = (own_end, digests[own_end])
        self._ends.move_to_end(found)
        return found, forgotten


def _digests(prompt: "TokenIds", lengths: list[int], tenant: bytes) -> dict[int, bytes]:
    """Digests of the prompt's beginnings of these ascending lengths."""
    data = np.ascontiguousarray(prompt, dtype=np.int32)
    running = hashlib.blake2b(hashlib.blake2b(tenant).digest(), digest_size=_DIGEST_BYTES)
    found = {}
    done = 0
    for length in lengths:
        running.update(data[done:length].tobytes())
        done = length
        found[length] = running.copy().digest()
    return found
