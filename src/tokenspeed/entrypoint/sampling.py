"""From the gateway's request to sampling parameters the engine understands, or a typed refusal."""

from collections.abc import Mapping
from typing import Any

from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.core.errors import InvalidParameter
from tokenspeed.core.sampling import TOKENS_MAX, SamplingParams

__all__ = ["SAMPLES_MAX", "check_supported", "samples_of", "sampling_params_of", "seeded"]

SAMPLES_MAX = 128
"""Most samples (`n`) of one request."""

_SEEDS = 2**64

# Scalars the gateway marks as set or unset; unset ones fall to the model's own defaults.
_OPTIONAL_SCALARS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def check_supported(request: Any) -> None:
    """Refuse what a `GenerateRequest` asks for and this engine would otherwise ignore.

    Raises:
        InvalidParameter: names the field and what to do without it.
    """
    params = request.sampling_params
    if request.HasField("mm_inputs") and request.mm_inputs.items:
        raise InvalidParameter("the request carries images, audio or video; the model takes text")
    if request.HasField("encode_bootstrap_info") or request.HasField("kv_bootstrap_info"):
        raise InvalidParameter(
            "the request is half of a prefill/decode pair; this engine runs whole requests. "
            "Register it as a plain worker."
        )
    if request.HasField("logprob_start_len") and request.logprob_start_len >= 0:
        raise InvalidParameter(
            "log-probabilities of the prompt are not offered; leave logprob_start_len unset "
            "(echo with logprobs asks for them)"
        )
    if request.token_ids_logprob:
        raise InvalidParameter(
            "log-probabilities of chosen token ids are not offered; ask for top_logprobs"
        )
    if request.HasField("data_parallel_rank") and request.data_parallel_rank not in (-1, 0):
        raise InvalidParameter(
            f"data_parallel_rank is {request.data_parallel_rank}, but this engine has rank 0 only"
        )
    if params.custom_params.fields:
        names = ", ".join(sorted(params.custom_params.fields))
        raise InvalidParameter(f"custom_params holds {names}; this engine knows none")


def samples_of(request: Any) -> int:
    """How many samples a `GenerateRequest` wants; an unset `n` is one.

    Raises:
        InvalidParameter: above `SAMPLES_MAX`.
    """
    count = int(request.sampling_params.n) or 1
    if count > SAMPLES_MAX:
        raise InvalidParameter(f"n must be in [1, {SAMPLES_MAX}], but is {count}")
    return count


def sampling_params_of(
    request: Any, *, defaults: Mapping[str, float | int], context_max: int
) -> SamplingParams:
    """The `SamplingParams` of one `GenerateRequest`.

    Args:
        request: a `tokenspeed.grpc.scheduler.GenerateRequest`.
        defaults: the model's own sampling defaults, by field name.
        context_max: tokens of a request; a larger max_new_tokens is cut to it, for the gateway
            forwards whatever the client wrote.

    Raises:
        InvalidParameter: a value outside its range, NaN and infinity included.
    """
    params = request.sampling_params
    scalars = {
        name: float(getattr(params, name))
        if params.HasField(name)
        else float(defaults.get(name, _UNSET[name]))
        for name in _OPTIONAL_SCALARS
    }
    top_k = int(params.top_k) if params.HasField("top_k") else int(defaults.get("top_k", 0))
    max_new_tokens = (
        min(int(params.max_new_tokens), context_max) if params.HasField("max_new_tokens") else None
    )
    return SamplingParams(
        **scalars,
        # Zero and below switch top-k off in every dialect the gateway speaks.
        top_k=top_k if top_k > 0 else None,
        logit_bias=_logit_bias(params.logit_bias),
        seed=int(params.sampling_seed) if params.HasField("sampling_seed") else None,
        logprobs=int(request.top_logprobs_num) if request.return_logprob else None,
        max_new_tokens=max_new_tokens,
        min_new_tokens=int(params.min_new_tokens),
        stop=tuple(params.stop),
        stop_token_ids=tuple(dict.fromkeys(int(token) for token in params.stop_token_ids)),
        ignore_eos=bool(params.ignore_eos),
        structured_outputs=_structured_outputs(params),
    )


def seeded(seed: int | None, index: int) -> int | None:
    """The seed of sample `index` of a request: its own stream, and the same one every time."""
    return None if seed is None else (seed + index) % _SEEDS


# The gateway's names of what a text must be, and ours.
_CONSTRAINTS = {
    "json_schema": "json",
    "regex": "regex",
    "ebnf_grammar": "grammar",
    "structural_tag": "structural_tag",
}

_UNSET = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def _structured_outputs(params: Any) -> StructuredOutputs | None:
    field = params.WhichOneof("constraint")
    if field is None:
        return None
    return StructuredOutputs(**{_CONSTRAINTS[field]: getattr(params, field)})


def _logit_bias(biases: Mapping[str, float]) -> dict[int, float]:
    """Token ids arrive as text, for JSON has no other keys."""
    result = {}
    for text, bias in biases.items():
        if not (text.isascii() and text.isdigit() and len(text) <= len(str(TOKENS_MAX))):
            raise InvalidParameter(f"logit_bias has the key {text[:32]!r}, which is no token id")
        result[int(text)] = float(bias)
    return result
