"""Constraints made to hurt, and random ones, past the gateway: each is enforced or refused, and
afterwards the engine is as it was."""

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

from tests.support.hostile import hostile_constraints

from .serving import Serve

ANSWER_TIMEOUT_S = 120
ENGINE_GROWTH_MAX_BYTES = 256 << 20
CLIENTS = 4

numbers = itertools.count()


def outcome(stub: Any, field: str, text: str) -> grpc.StatusCode | str:
    """Why the answer ended, or the status of the refusal."""
    request = pb.GenerateRequest(
        request_id=f"hostile-{next(numbers)}",
        tokenized=pb.TokenizedInput(input_ids=[1, 9, 77, 1024]),
    )
    request.sampling_params.max_new_tokens = 6
    setattr(request.sampling_params, field, text)
    try:
        (message,) = stub.Generate(request, timeout=ANSWER_TIMEOUT_S)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
        assert code is grpc.StatusCode.INVALID_ARGUMENT, (field, text[:200], code, error)
        assert "constraint" in error.details() or "structured" in error.details()  # type: ignore[attr-defined]
        return code
    return str(message.complete.finish_reason)


@pytest.fixture(scope="module")
def stub(server: Serve) -> Iterator[Any]:
    """The servicer; afterwards it has the same engine, with every page back and little more
    memory."""
    with server.servicer() as channel:
        stub = pb_grpc.TokenSpeedSchedulerStub(channel)
        for _ in range(3):
            assert outcome(stub, "regex", "[a-z]+") in ("stop", "length")
        engine = server.engine()
        before_bytes = engine.memory_info().rss
        yield stub
        assert server.engine() == engine
        assert server.wait_until_idle(channel)["pages_active"] == 0
        (worker,) = [p for p in engine.children() if "tokenspeed.grammar.worker" in p.cmdline()]
        assert worker.children() == []
        assert engine.memory_info().rss - before_bytes < ENGINE_GROWTH_MAX_BYTES
        assert outcome(stub, "regex", "[a-z]+") in ("stop", "length")


@pytest.mark.slow
def test_hostile_constraints_are_enforced_or_refused(stub: Any) -> None:
    constraints = hostile_constraints()
    assert len(constraints) >= 200
    with ThreadPoolExecutor(CLIENTS) as clients:
        ends = list(clients.map(lambda item: outcome(stub, *item), constraints))
    # Neither way is the answer to all.
    assert ends.count(grpc.StatusCode.INVALID_ARGUMENT) >= 50
    assert sum(end in ("stop", "length") for end in ends) >= 50


KEYWORDS = st.sampled_from(
    [
        "type",
        "properties",
        "items",
        "required",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "$ref",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "multipleOf",
        "minItems",
        "maxItems",
        "additionalProperties",
        "prefixItems",
        "patternProperties",
        "uniqueItems",
        "if",
        "then",
        "else",
    ]
)
WORDS = st.sampled_from(
    ["object", "array", "string", "integer", "number", "null", "a", "^a+$", "date", "#", "#/a"]
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.floats(allow_nan=False), WORDS, st.text()
)
VALUES: st.SearchStrategy[Any] = st.deferred(
    lambda: st.one_of(
        LEAVES,
        st.lists(VALUES, max_size=3),
        st.dictionaries(KEYWORDS, VALUES, max_size=3),
        st.dictionaries(st.text(max_size=3), VALUES, max_size=2),
    )
)
SCHEMAS = st.dictionaries(KEYWORDS, VALUES, max_size=5).map(json.dumps)
FRAGMENTS = st.sampled_from(
    [
        "a",
        "b",
        ".",
        "[a-c]",
        "\\d",
        "\\p{L}",
        "(",
        ")",
        "|",
        "*",
        "+",
        "?",
        "{2}",
        "{1,9}",
        "^",
        "$",
    ]
)
REGEXES = st.lists(FRAGMENTS, max_size=16).map("".join)
RULES = st.sampled_from(
    ["root", "::=", '"a"', "[b-d]", "item", "|", "(", ")", "*", "+", "?", "\n", '""', "{2,3}", "#"]
)
GRAMMARS = st.lists(RULES, max_size=16).map(lambda parts: "root ::= " + " ".join(parts))


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.one_of(
        st.tuples(st.just("json_schema"), SCHEMAS),
        st.tuples(st.just("regex"), REGEXES),
        st.tuples(st.just("ebnf_grammar"), GRAMMARS),
        st.tuples(st.just("structural_tag"), VALUES.map(json.dumps)),
    )
)
def test_random_constraints_are_enforced_or_refused(stub: Any, constraint: tuple[str, str]) -> None:
    field, text = constraint
    assert outcome(stub, field, text.encode("utf-8", "replace").decode())
