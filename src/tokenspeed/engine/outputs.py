"""What the offline and asynchronous interfaces return."""

from dataclasses import dataclass

from tokenspeed.core.step import CacheReport, FinishReason
from tokenspeed.engine.stream import TokenLogprob

__all__ = ["Completion", "GenerationOutput", "TextDelta"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One generated text.

    Attributes:
        text: without stop strings and special tokens.
        token_ids: as generated; a stop token that ended the text is the last of them.
        logprobs: one entry a token, where asked for.
        finish_reason: why it ended.
        stop: the stop string or stop token id that ended it, where one did.
        drafted_tokens, accepted_tokens: guesses that steps verified, and those that were right.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason
    stop: str | int | None
    drafted_tokens: int
    accepted_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOutput:
    """All completions of one prompt.

    Attributes:
        prompt_token_ids: the prompt.
        cached_tokens: prompt tokens that came from the prefix cache, for the first completion.
        cache: of the first completion, where the prompt's tokens came from and why the rest did
            not; None if it ended before it began.
        completions: as many as were asked for.
    """

    prompt_token_ids: list[int]
    cached_tokens: int
    cache: CacheReport | None
    completions: list[Completion]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Text and tokens generated since the last delta; `finish_reason` is set on the last.

    `drafted_tokens` and `accepted_tokens` are those of the request so far.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    prompt_tokens: int
    cached_tokens: int
    cache: CacheReport | None
    finish_reason: FinishReason | None
    drafted_tokens: int
    accepted_tokens: int
