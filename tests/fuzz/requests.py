"""Requests to the servicer: most fields as they should be, some as nobody should send them."""

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tests.support.hostile import hostile_constraints

__all__ = ["Call", "calls"]

VOCABULARY = 49_152
INT32 = st.sampled_from([-(2**31), -2, -1, 0, 1, 7, 2**31 - 1])
UINT32 = st.sampled_from([0, 1, 7, 128, 129, 2**31, 2**32 - 1])
FLOATS = st.one_of(
    st.floats(0.0, 2.0, width=32),
    st.sampled_from([-1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")]),
)
SHORT = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)
PROMPTS = st.one_of(
    *[SHORT] * 12,
    st.lists(st.integers(0, 2**32 - 1), max_size=8),
    # At the edge of the context and past it.
    st.sampled_from([1000, 1022, 1023, 1024, 5000]).map(lambda count: [9] * count),
)
DEEP = st.integers(1, 3000).map(lambda depth: '{"a":' * depth + "1" + "}" * depth)
CONSTRAINTS = st.one_of(
    st.sampled_from([item for item in hostile_constraints() if len(item[1]) < 20_000]),
    st.tuples(st.just("json_schema"), DEEP),
    st.tuples(st.just("structural_tag"), DEEP),
    st.tuples(st.just("regex"), st.sampled_from(["[a-z]{1,9}", "yes|no", "(", "(?!a)"])),
    st.tuples(
        st.just("json_schema"),
        st.sampled_from([{"type": "boolean"}, {"enum": ["a", 1]}, {"not": {}}]).map(json.dumps),
    ),
)
# Each is given rarely: one that is refused hides what the others do.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": FLOATS,
    "top_p": FLOATS,
    "min_p": FLOATS,
    "repetition_penalty": FLOATS,
    "presence_penalty": FLOATS,
    "frequency_penalty": FLOATS,
    "top_k": INT32,
    "min_new_tokens": UINT32,
    "sampling_seed": st.sampled_from([0, 1, 2**63 - 1]),
    "ignore_eos": st.booleans(),
    "no_stop_trim": st.booleans(),
    "stop": st.lists(st.text(max_size=6), max_size=5),
    "stop_token_ids": st.lists(st.integers(0, 2**32 - 1), max_size=4),
    "n": st.sampled_from([0, 1, 1, 2, 3, 16, 129, 2**32 - 1]),
    "logit_bias": st.dictionaries(
        st.one_of(st.text(max_size=6), st.integers(0, 10**9).map(str)), FLOATS, max_size=4
    ),
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request, and after how many messages its client goes away; None to stay."""

    request: Any
    leaves_after: int | None
    aborts: bool


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """One call."""
    params = {
        name: draw(values)
        for name, values in FIELDS.items()
        if draw(st.integers(0, 19), label=name) == 7
    }
    tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 8, 300, 100_000, 2**32 - 1]))
    if draw(st.booleans()):
        params["max_new_tokens"] = tokens
    else:
        params["max_new_tokens"] = min(tokens, 8)
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=draw(PROMPTS)),
        sampling_params=pb.SamplingParams(**params),
        stream=draw(st.booleans()),
        return_logprob=draw(st.integers(0, 9)) == 7,
        top_logprobs_num=draw(st.sampled_from([0, 0, 1, 5, 20, 21, 2**31 - 1, -1])),
    )
    if draw(st.integers(0, 9)) == 7:
        field, text = draw(CONSTRAINTS)
        setattr(request.sampling_params, field, text)
    if draw(st.integers(0, 39)) == 7:
        request.data_parallel_rank = draw(INT32)
    if draw(st.integers(0, 39)) == 7:
        request.logprob_start_len = draw(INT32)
    # Whoever wants an endless answer leaves it.
    endless = params["max_new_tokens"] > 8
    request.stream |= endless
    leaves = endless or draw(st.integers(0, 4)) == 0
    return Call(
        request=request,
        leaves_after=draw(st.integers(0, 4)) if leaves else None,
        aborts=draw(st.booleans()),
    )
