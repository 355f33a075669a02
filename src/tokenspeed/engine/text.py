"""From token deltas to text."""

from tokenspeed import loader
from tokenspeed.core.step import FinishReason
from tokenspeed.engine.stream import TokenDelta

__all__ = ["TextAssembler"]


class TextAssembler:
    """The text of one request, piece by piece, cut before the stop string that ends it.

    Args:
        tokenizer: the model's.
        stops: the request's stop strings; text that may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: loader.Tokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = tokenizer.incremental_detokenizer()
        self._held = ""
        self._held_chars = max(map(len, stops)) - 1 if stops else 0

    def push(self, delta: TokenDelta) -> str:
        """The text that a delta makes certain."""
        visible = delta.token_ids
        if delta.stop_token_id is not None:
            visible = visible[:-1]
        text = self._held + self._detokenizer.push(visible)
        if delta.stop_string is not None:
            self._held = ""
            return text[: text.find(delta.stop_string)]
        if delta.finish_reason is not None:
            self._held = ""
            return text + self._detokenizer.flush()
        cut = len(text) - self._held_chars
        self._held = text[max(cut, 0) :]
        return text[: max(cut, 0)]


def stop_of(delta: TokenDelta) -> str | int | None:
    """The stop string or stop token that ended a stream."""
    if delta.finish_reason is not FinishReason.STOP:
        return None
    return delta.stop_string if delta.stop_string is not None else delta.stop_token_id
