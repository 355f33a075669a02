"""From the gateway's request to sampling parameters."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed.core.constraint import CONSTRAINT_SIZE_MAX_BYTES, StructuredOutputs
from tokenspeed.core.errors import InvalidParameter, RequestError
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.entrypoint.sampling import (
    SAMPLES_MAX,
    check_supported,
    samples_of,
    sampling_params_of,
    seeded,
)

CONTEXT_MAX = 4096


def translated(request: pb.GenerateRequest, **defaults: float) -> SamplingParams:
    return sampling_params_of(request, defaults=defaults, context_max=CONTEXT_MAX)


def with_params(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(sampling_params=pb.SamplingParams(**fields))


def test_unset_fields_take_the_models_defaults_then_the_neutral_ones() -> None:
    params = translated(pb.GenerateRequest(), temperature=0.6, top_k=20)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 1.0)
    assert (params.min_p, params.repetition_penalty, params.max_new_tokens) == (0.0, 1.0, None)


def test_a_set_zero_is_not_an_unset_field() -> None:
    params = translated(with_params(temperature=0.0, top_k=0), temperature=0.6, top_k=20)
    assert params.greedy
    assert params.top_k is None


@pytest.mark.parametrize("top_k", [0, -1, -(2**31)])
def test_top_k_of_zero_and_below_is_off(top_k: int) -> None:
    assert translated(with_params(top_k=top_k)).top_k is None


def test_huge_max_new_tokens_is_cut_to_the_context() -> None:
    assert translated(with_params(max_new_tokens=2**32 - 1)).max_new_tokens == CONTEXT_MAX


@pytest.mark.parametrize(
    "name",
    ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidParameter, match=name):
        translated(with_params(**{name: value}))


@pytest.mark.parametrize("key", ["", "a", "-1", "1.5", "٣", "9" * 40, "1_0", " 1"])
def test_a_logit_bias_key_that_is_no_token_id_is_refused(key: str) -> None:
    with pytest.raises(InvalidParameter, match="logit_bias"):
        translated(with_params(logit_bias={key: 1.0}))


def test_logprobs_are_off_unless_asked_for() -> None:
    assert translated(pb.GenerateRequest(top_logprobs_num=5)).logprobs is None
    assert translated(pb.GenerateRequest(return_logprob=True)).logprobs == 0
    request = pb.GenerateRequest(return_logprob=True, top_logprobs_num=5)
    assert translated(request).logprobs == 5


def test_seeds_of_samples_differ_and_wrap() -> None:
    assert seeded(None, 3) is None
    assert [seeded(2**64 - 1, index) for index in range(3)] == [2**64 - 1, 0, 1]


def test_the_number_of_samples_is_bounded() -> None:
    assert samples_of(pb.GenerateRequest()) == 1
    assert samples_of(with_params(n=4)) == 4
    with pytest.raises(InvalidParameter, match="n must be"):
        samples_of(with_params(n=SAMPLES_MAX + 1))


@pytest.mark.parametrize(
    ("field", "ours"),
    [
        ("regex", StructuredOutputs(regex="x")),
        ("json_schema", StructuredOutputs(json="x")),
        ("ebnf_grammar", StructuredOutputs(grammar="x")),
        ("structural_tag", StructuredOutputs(structural_tag="x")),
    ],
)
def test_a_constraint_is_handed_on(field: str, ours: StructuredOutputs) -> None:
    assert translated(with_params(**{field: "x"})).structured_outputs == ours
    assert translated(pb.GenerateRequest()).structured_outputs is None
    # An empty one is one all the same; what is wrong with it the engine says.
    assert translated(with_params(**{field: ""})).structured_outputs is not None


def test_a_constraint_that_is_too_large_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="bytes"):
        translated(with_params(regex="x" * (CONSTRAINT_SIZE_MAX_BYTES + 1)))


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(logprob_start_len=0),
        pb.GenerateRequest(token_ids_logprob=[1]),
        pb.GenerateRequest(mm_inputs=pb.MultimodalInputs(items=[pb.MultimodalItem()])),
        pb.GenerateRequest(kv_bootstrap_info=pb.KvBootstrapInfo(bootstrap_room=1)),
        pb.GenerateRequest(encode_bootstrap_info=pb.EncodeBootstrapInfo()),
        pb.GenerateRequest(data_parallel_rank=1),
    ],
    ids=lambda request: str(request).split(maxsplit=1)[0],
)
def test_what_the_engine_cannot_do_is_refused(request_: pb.GenerateRequest) -> None:
    with pytest.raises(InvalidParameter):
        check_supported(request_)


def test_unknown_custom_parameters_are_refused_by_name() -> None:
    request = pb.GenerateRequest()
    request.sampling_params.custom_params.update({"magic": 1})
    with pytest.raises(InvalidParameter, match="magic"):
        check_supported(request)


def test_what_the_gateway_always_sends_is_supported() -> None:
    request = pb.GenerateRequest(logprob_start_len=-1, data_parallel_rank=0)
    request.sampling_params.skip_special_tokens = True
    check_supported(request)


floats = st.floats(width=32)
uint32 = st.integers(0, 2**32 - 1)
int32 = st.integers(-(2**31), 2**31 - 1)


@st.composite
def requests(draw: st.DrawFn) -> pb.GenerateRequest:
    request = pb.GenerateRequest(return_logprob=draw(st.booleans()), top_logprobs_num=draw(int32))
    params = request.sampling_params
    optional = {
        "temperature": floats,
        "top_p": floats,
        "top_k": int32,
        "min_p": floats,
        "frequency_penalty": floats,
        "presence_penalty": floats,
        "repetition_penalty": floats,
        "max_new_tokens": uint32,
        "sampling_seed": st.integers(0, 2**64 - 1),
    }
    for name, values in optional.items():
        if draw(st.booleans()):
            setattr(params, name, draw(values))
    params.min_new_tokens = draw(uint32)
    params.n = draw(uint32)
    params.stop.extend(draw(st.lists(st.text(max_size=8), max_size=4)))
    params.stop_token_ids.extend(draw(st.lists(uint32, max_size=4)))
    for key, bias in draw(st.dictionaries(st.text(max_size=4), floats, max_size=3)).items():
        params.logit_bias[key] = bias
    return request


@given(requests())
def test_any_request_gives_valid_parameters_or_a_typed_refusal(
    request_: pb.GenerateRequest,
) -> None:
    try:
        check_supported(request_)
        samples = samples_of(request_)
        params = translated(request_)
    except RequestError as error:
        assert str(error)
        return
    assert 1 <= samples <= SAMPLES_MAX
    assert math.isfinite(params.temperature)
    assert 0.0 < params.top_p <= 1.0
    assert params.top_k is None or params.top_k >= 1
    assert params.max_new_tokens is None or 1 <= params.max_new_tokens <= CONTEXT_MAX
