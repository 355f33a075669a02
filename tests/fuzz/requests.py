"""Requests to the servicer: most that any client might send, some that nobody should.

Each field of a hostile call is hostile rarely, because one that is refused hides what the others
do; the calls that are meant to run try every parameter there is, together.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tests.support.hostile import hostile_constraints

__all__ = ["Call", "asides", "calls"]

VOCABULARY = 49_152
CONTEXT_MAX = 1024
# Whoever wants more than this leaves before it comes.
TOKENS_MAX = 48

FLOATS = st.one_of(
    st.floats(0.0, 2.0, width=32),
    st.sampled_from([-1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")]),
)
INT32 = st.sampled_from([-(2**31), -2, -1, 0, 1, 7, 2**31 - 1])
UINT32 = st.sampled_from([0, 1, 7, 128, 129, 2**31, 2**32 - 1])

# Some prompts begin alike, so that the cache is used; some come whole a second time.
PROMPTS = st.builds(
    lambda seed, shared, own: [*text(seed % 5, shared), *text(seed, own)],
    st.integers(0, 400),
    st.sampled_from([0, 0, 0, 40, 200, 600]),
    st.one_of(*[st.integers(1, 60)] * 3, st.sampled_from([100, 250, 400])),
)
HOSTILE_PROMPTS = st.one_of(
    st.just([]),
    st.lists(st.integers(0, 2**32 - 1), max_size=8),
    st.sampled_from([1022, 1023, 1024, 5000, 200_000]).map(lambda count: [9] * count),
)

DEEP = st.integers(1, 3000).map(lambda depth: '{"a":' * depth + "1" + "}" * depth)
HOSTILE_CONSTRAINTS = st.one_of(
    st.sampled_from(hostile_constraints()),
    st.tuples(st.sampled_from(["json_schema", "structural_tag"]), DEEP),
    st.tuples(st.sampled_from(["regex", "ebnf_grammar"]), st.text(max_size=30)),
)
CONSTRAINTS = st.one_of(
    st.tuples(st.just("regex"), st.sampled_from(["[a-z]{1,9}", "yes|no", "(a|b)*c", "é+"])),
    st.tuples(
        st.just("json_schema"),
        st.sampled_from(
            [
                {"type": "boolean"},
                {"enum": ["a", 1]},
                {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
                {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
            ]
        ).map(json.dumps),
    ),
    st.just(("ebnf_grammar", 'root ::= "a" root | "b"')),
    st.just(
        (
            "structural_tag",
            json.dumps(
                {
                    "structures": [
                        {"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"},
                    ],
                    "triggers": ["<f>"],
                }
            ),
        )
    ),
)
PENALTIES = st.floats(-2.0, 2.0, width=32)
PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    "top_p": st.floats(0.0625, 1.0, width=32),
    "min_p": st.floats(0.0, 1.0, width=32),
    "repetition_penalty": st.floats(0.5, 2.0, width=32),
    "presence_penalty": PENALTIES,
    "frequency_penalty": PENALTIES,
    "top_k": st.sampled_from([-1, 0, 1, 2, 50, 2**31 - 1]),
    "min_new_tokens": st.integers(0, 1),
    "sampling_seed": st.sampled_from([0, 1, 2**63 - 1]),
    "ignore_eos": st.booleans(),
    "no_stop_trim": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "stop": st.lists(st.sampled_from(["a", " the", "\n", "no such text", "é"]), max_size=3),
    "stop_token_ids": st.lists(st.integers(0, VOCABULARY - 1), max_size=3),
    "n": st.sampled_from([1, 2, 2, 3, 5]),
    "logit_bias": st.dictionaries(
        st.integers(0, VOCABULARY - 1).map(str), st.floats(-100.0, 100.0, width=32), max_size=3
    ),
}
HOSTILE_PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(
        (
            *("temperature", "top_p", "min_p"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty"),
        ),
        FLOATS,
    ),
    "top_k": INT32,
    "min_new_tokens": UINT32,
    "max_new_tokens": UINT32,
    "stop": st.one_of(
        st.lists(st.text(max_size=6), max_size=5),
        st.sampled_from([["x" * 1025], ["x"] * 17, [""]]),
    ),
    "stop_token_ids": st.one_of(
        st.lists(st.integers(0, 2**32 - 1), max_size=4), st.just([*range(257)])
    ),
    "n": st.sampled_from([0, 16, 128, 129, 2**31, 2**32 - 1]),
    "logit_bias": st.dictionaries(
        st.one_of(st.text(max_size=6), st.integers(0, 10**9).map(str)), FLOATS, max_size=4
    ),
}


@dataclass(frozen=True, kw_only=True, repr=False)
class Call:
    """A request, and what its client does with it.

    Attributes:
        request: what is asked.
        hostile: whether any of it is meant to hurt; the others are to be served.
        raw: what is sent in its place, which may be no message at all; None to send it.
        leaves_after: the number of messages after which the client goes away; None to stay.
        aborts: whether it says so, as the gateway does, or just cancels.
    """

    request: Any
    hostile: bool = False
    raw: bytes | None = None
    leaves_after: int | None = None
    aborts: bool = False

    def __repr__(self) -> str:
        """Short enough to be read: prompts are told by their beginning."""
        request = pb.GenerateRequest()
        request.CopyFrom(self.request)
        ids = request.tokenized.input_ids
        told = f"{len(ids)} tokens {ids[:4]}"
        del ids[:]
        raw = "" if self.raw is None else f", as the bytes {self.raw[:300]!r}"
        leaves = f"leaves after {self.leaves_after}, aborts {self.aborts}"
        return f"Call({told}, {str(request)[:1000]!r}{raw}, {leaves})"


def asides() -> st.SearchStrategy[list[tuple[str, Any]]]:
    """Methods that are called beside, and their requests: none of them may disturb what runs."""
    names = st.sampled_from(["fuzz-1", "fuzz-9999", "", "no such request", "é" * 500])
    times = st.sampled_from([0.0, 0.01, -1.0, float("nan"), 1e30])
    return st.lists(
        st.one_of(
            st.just(("HealthCheck", pb.HealthCheckRequest())),
            st.just(("GetServerInfo", pb.GetServerInfoRequest())),
            st.just(("GetModelInfo", pb.GetModelInfoRequest())),
            INT32.map(lambda rank: ("GetLoads", pb.GetLoadsRequest(dp_rank=rank))),
            names.map(lambda name: ("Abort", pb.AbortRequest(request_id=name))),
            times.map(lambda s: ("FlushCache", common_pb2.FlushCacheRequest(timeout_s=s))),
        ),
        max_size=4,
    )


def text(seed: int, count: int) -> list[int]:
    """Tokens that the same seed gives again, and fewer of which are their beginning."""
    drawn = np.random.Generator(np.random.Philox(seed)).integers(0, VOCABULARY, 1000)
    return [int(token) for token in drawn[:count]]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """One call: three of four are to be served, one of twenty-five is bytes."""
    kind = draw(st.integers(0, 99))
    if kind < 75:
        return draw(honest_calls())
    if kind < 96:
        return draw(hostile_calls())
    return draw(broken(draw(st.one_of(honest_calls(), hostile_calls()))))


@st.composite
def honest_calls(draw: st.DrawFn) -> Call:
    """A call as a client might make it, with some of the parameters."""
    names = draw(st.lists(st.sampled_from(sorted(PARAMETERS)), max_size=5, unique=True))
    params = {name: draw(PARAMETERS[name]) for name in names}
    params["max_new_tokens"] = draw(st.sampled_from([1, 2, 3, 5, 8, 13, 20, TOKENS_MAX]))
    prompt = draw(PROMPTS)
    endless = draw(st.integers(0, 19)) == 7
    if endless:
        params |= {"max_new_tokens": 2**32 - 1, "ignore_eos": True}
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=prompt[: CONTEXT_MAX - TOKENS_MAX]),
        sampling_params=pb.SamplingParams(**params),
        stream=endless or draw(st.booleans()),
        return_logprob=draw(st.integers(0, 3)) == 3,
        top_logprobs_num=draw(st.sampled_from([0, 1, 5, 20])),
    )
    if draw(st.integers(0, 5)) == 5:
        field, value = draw(CONSTRAINTS)
        setattr(request.sampling_params, field, value)
    leaves = endless or draw(st.integers(0, 5)) == 5
    return Call(
        request=request,
        leaves_after=draw(st.integers(0, 6)) if leaves else None,
        aborts=draw(st.booleans()),
    )


@st.composite
def hostile_calls(draw: st.DrawFn) -> Call:
    """A call with one to three things that nobody should send."""
    names = [*HOSTILE_PARAMETERS, "prompt", "constraint", "rank", "logprobs", "parts"]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    params = {name: draw(HOSTILE_PARAMETERS[name]) for name in chosen if name in HOSTILE_PARAMETERS}
    params.setdefault("max_new_tokens", draw(st.sampled_from([1, 4])))
    prompt = draw(HOSTILE_PROMPTS if "prompt" in chosen else PROMPTS)
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=prompt),
        sampling_params=pb.SamplingParams(**params),
    )
    if "constraint" in chosen:
        field, value = draw(HOSTILE_CONSTRAINTS)
        # Half of a surrogate pair is no text that a message could hold.
        setattr(request.sampling_params, field, value.encode(errors="replace").decode())
    if "rank" in chosen:
        request.data_parallel_rank = draw(INT32)
    if "logprobs" in chosen:
        request.return_logprob = True
        request.top_logprobs_num = draw(INT32)
        request.logprob_start_len = draw(INT32)
    if "parts" in chosen:
        request.token_ids_logprob.extend(draw(st.lists(st.integers(0, 2**32 - 1), max_size=3)))
        request.sampling_params.custom_params.update({draw(st.text(max_size=9)): {"a": [1]}})
    endless = params["max_new_tokens"] > TOKENS_MAX
    request.stream = endless or draw(st.booleans())
    return Call(
        request=request,
        hostile=True,
        leaves_after=draw(st.integers(0, 3)) if endless else None,
        aborts=draw(st.booleans()),
    )


@st.composite
def broken(draw: st.DrawFn, call: Call) -> Call:
    """The same call with some bytes changed, left out or put in: bad UTF-8, lengths that lie."""
    call.request.request_id = f"broken-{draw(st.integers(0, 2**40))}"
    data = bytearray(call.request.SerializeToString()[:2000])
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        junk = draw(st.binary(max_size=4))
        match draw(st.integers(0, 2)):
            case 0:
                data[place : place + len(junk)] = junk
            case 1:
                data[place:place] = junk
            case _:
                del data[place : place + len(junk)]
    return Call(request=call.request, hostile=True, raw=bytes(data), leaves_after=3)
