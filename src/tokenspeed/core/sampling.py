"""How the next token of a request is chosen."""

import math
from collections.abc import Mapping
from typing import Any, Self

from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.core.errors import InvalidParameter
from tokenspeed.core.records import Record

__all__ = ["SamplingParams"]

TOKENS_MAX = 2**31 - 1
TOP_LOGPROBS_MAX = 20
STOP_STRINGS_MAX = 16
STOP_STRING_CHARS_MAX = 1024
STOP_TOKENS_MAX = 256
LOGIT_BIAS_MAX = 1024


class SamplingParams(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request, valid once constructed.

    Attributes:
        temperature: 0 is greedy; above it, logits are divided by it.
        top_k: keep the k likeliest tokens; None keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p (nucleus sampling,
            Holtzman et al. 2020).
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of every token seen
            in prompt or output (CTRL, Keskar et al. 2019, section 4.1).
        presence_penalty: subtracted once from the logit of each token seen in the output.
        frequency_penalty: subtracted once per occurrence in the output.
        logit_bias: added to the logit of a token id.
        seed: 64-bit seed of the request's own counter-based stream; None lets the engine choose.
        logprobs: None for none; k >= 0 for the sampled token's log-probability and the k
            likeliest beside it, taken from the model's distribution before any of the above.
        max_new_tokens: most tokens to generate; None for as many as the context holds.
        min_new_tokens: no stop token is sampled before this many tokens.
        stop: strings that end the text, and are not part of it.
        stop_token_ids: token ids that end the text beside the model's own.
        ignore_eos: go on past the model's own end-of-text tokens.
        structured_outputs: what the text must be; None lets it be anything. It goes before
            `min_new_tokens` and `ignore_eos`: a text that can only end does end.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = {}
    seed: int | None = None
    logprobs: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.top_k is not None:
            _check("top_k", self.top_k, 1, TOKENS_MAX)
        if self.seed is not None:
            _check("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, TOP_LOGPROBS_MAX)
        if self.max_new_tokens is not None:
            _check("max_new_tokens", self.max_new_tokens, 1, TOKENS_MAX)
        _check("min_new_tokens", self.min_new_tokens, 0, TOKENS_MAX)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InvalidParameter(
                f"min_new_tokens ({self.min_new_tokens}) is above "
                f"max_new_tokens ({self.max_new_tokens})"
            )
        _check("the number of stop strings", len(self.stop), 0, STOP_STRINGS_MAX)
        for text in self.stop:
            _check("the length of a stop string", len(text), 1, STOP_STRING_CHARS_MAX)
        _check("the number of stop_token_ids", len(self.stop_token_ids), 0, STOP_TOKENS_MAX)
        for token in self.stop_token_ids:
            _check("a stop token id", token, 0, TOKENS_MAX)
        _check("the number of logit_bias entries", len(self.logit_bias), 0, LOGIT_BIAS_MAX)
        for token, bias in self.logit_bias.items():
            _check("a token id of logit_bias", token, 0, TOKENS_MAX)
            _check(f"logit_bias of token {token}", bias, -100.0, 100.0)

    @classmethod
    def recommended(cls, values: Mapping[str, float]) -> Self:
        """Parameters as the makers of a model recommend them, by field; JSON may write `top_k` as
        a fraction."""
        fields: dict[str, Any] = {**values}
        if "top_k" in fields:
            fields["top_k"] = int(fields["top_k"])
        return cls(**fields)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken every time."""
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _check(what: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    fits = math.isfinite(value) and value <= high and (value > low if low_open else value >= low)
    if not fits:
        bracket = "(" if low_open else "["
        raise InvalidParameter(f"{what} must be in {bracket}{low}, {high}], but is {value}")
