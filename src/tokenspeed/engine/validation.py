"""What a request must be before it is sent to an engine."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenspeed.core.config import EngineConfig
from tokenspeed.core.errors import ConfigError, ContextOverflow, InvalidParameter
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.core.step import Int32Array
from tokenspeed.engine.facts import EngineInfo

__all__ = ["check_one_engine", "checked_max_new_tokens", "checked_prompt"]


def check_one_engine(config: EngineConfig) -> None:
    """Raises ConfigError where more than one engine is asked for of what is one."""
    if config.dp > 1:
        raise ConfigError(
            f"dp is {config.dp}, but this is one engine: `tokenspeed serve --dp {config.dp}` has "
            "several behind one address; or start an LLM in each of several processes"
        )


def checked_prompt(
    prompt: Sequence[int] | npt.NDArray[np.integer[Any]], info: EngineInfo
) -> Int32Array:
    """The prompt as token ids [T] int32.

    Raises:
        InvalidParameter: it is empty, or holds an id outside the vocabulary.
        ContextOverflow: it leaves no room for one new token in the context or in the KV pool.
    """
    if len(prompt) == 0:
        raise InvalidParameter("the prompt is empty; at least one token is needed")
    if len(prompt) >= info.context_max:
        raise ContextOverflow(
            f"the prompt has {len(prompt)} tokens and needs room for at least one more, but the "
            f"context holds {info.context_max}. Shorten it, or serve with a larger --max-context "
            "if the model allows it."
        )
    pool_tokens = info.pages * info.page_size
    if len(prompt) >= pool_tokens:
        raise ContextOverflow(
            f"the prompt has {len(prompt)} tokens and needs room for at least one more, but the "
            f"KV cache holds {pool_tokens}. Serve with a larger --kv-cache-memory."
        )
    ids = np.asarray(prompt, dtype=np.int64)
    if ids.min() < 0 or ids.max() >= info.vocab_size:
        wrong = int(ids[(ids < 0) | (ids >= info.vocab_size)][0])
        raise InvalidParameter(
            f"token id {wrong} is outside the vocabulary of {info.vocab_size} tokens"
        )
    return ids.astype(np.int32)


def checked_max_new_tokens(prompt_tokens: int, params: SamplingParams, info: EngineInfo) -> int:
    """How many tokens may be generated: what was asked for, within what the context holds.

    Raises:
        InvalidParameter: a parameter names a token outside the vocabulary, or more tokens are
            demanded by min_new_tokens than the context holds.
    """
    for token in (*params.logit_bias, *params.stop_token_ids):
        if token >= info.vocab_size:
            raise InvalidParameter(
                f"token id {token} in logit_bias or stop_token_ids is outside the vocabulary of "
                f"{info.vocab_size} tokens"
            )
    room = min(info.context_max, info.pages * info.page_size) - prompt_tokens
    if params.min_new_tokens > room:
        raise InvalidParameter(
            f"min_new_tokens is {params.min_new_tokens}, but after a prompt of {prompt_tokens} "
            f"tokens the context has room for {room}"
        )
    return room if params.max_new_tokens is None else min(params.max_new_tokens, room)
