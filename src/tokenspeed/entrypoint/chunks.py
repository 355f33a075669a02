"""Cuts a stream's tokens into the chunks that the gateway's parsers read rightly."""

from collections.abc import Sequence

__all__ = ["ALONE_AFTER_MARK", "ChunkCutter"]

# Names of functions, separators and the first argument lie within this many tokens of a mark.
ALONE_AFTER_MARK = 24


class ChunkCutter:
    """Where the chunks of one stream end.

    The gateway's streaming parsers look at a chunk at a time, and lose text and calls where a
    chunk holds a mark (of a tool call, of reasoning) together with what stands before or after
    it. So a mark has a chunk to itself, and so has each of the next tokens. Plain text stays in
    one piece.

    Args:
        marks: tokens that mean more than the text they are written as.
    """

    def __init__(self, marks: frozenset[int]) -> None:
        self._marks = marks
        self._alone = 0

    def cut(self, token_ids: Sequence[int]) -> list[slice]:
        """The chunks that the next tokens of the stream are to be sent in; none for no tokens."""
        if not token_ids:
            return []
        if not self._alone and self._marks.isdisjoint(token_ids):
            return [slice(0, len(token_ids))]
        parts: list[slice] = []
        start = 0
        for index, token in enumerate(token_ids):
            if token in self._marks:
                if start < index:
                    parts.append(slice(start, index))
                self._alone = ALONE_AFTER_MARK
            elif self._alone:
                self._alone -= 1
            else:
                continue
            parts.append(slice(index, index + 1))
            start = index + 1
        if start < len(token_ids):
            parts.append(slice(start, len(token_ids)))
        return parts
