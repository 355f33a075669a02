"""Answers that must be what was asked for: through the gateway, with OpenAI's client."""

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import grpc
import openai
import psutil
import pytest
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

from tests.support.grammars import SLOW
from tokenspeed import LLM, AsyncLLM, SamplingParams, StructuredOutputs
from tokenspeed.core.errors import InvalidParameter
from tokenspeed.core.step import FinishReason
from tokenspeed.loader import ModelFiles

from .serving import Serve, wait_for

MODEL = "qwen2.5-coder-0.5b"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
STRICT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": PERSON, "strict": True},
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {argument: kind},
                "required": [argument],
                "additionalProperties": False,
            },
        },
    }
    for name, argument, kind in (
        ("read_file", "path", {"type": "string", "maxLength": 40}),
        ("wait", "seconds", {"type": "integer", "minimum": 1, "maximum": 9}),
    )
]
ASK: list[Any] = [{"role": "user", "content": "Invent a person."}]


def is_person(text: str | None) -> bool:
    value = json.loads(text or "")
    assert list(value) == ["name", "age", "tags"]
    assert isinstance(value["name"], str)
    assert 0 <= value["age"] <= 120
    assert set(value["tags"]) <= {"a", "b", "c"}
    return True


@pytest.fixture(scope="module")
def coder(qwen_coder: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    with Serve(tmp_path_factory.mktemp("coder") / "log", model=MODEL) as running:
        yield running


@pytest.fixture(scope="module")
def client(coder: Serve) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{coder.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **options: Any) -> Any:
    options = {"messages": ASK, "max_tokens": 160, "temperature": 1.0, **options}
    return client.chat.completions.create(model=MODEL, **options)


@pytest.mark.slow
def test_strict_schemas_hold_for_every_sample_at_any_temperature(client: openai.OpenAI) -> None:
    for temperature in (0.0, 1.0, 1.8):
        answer = chat(client, response_format=STRICT, n=4, temperature=temperature, seed=1)
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert is_person(choice.message.content)


@pytest.mark.slow
def test_a_streamed_answer_is_the_same_as_a_whole_one(client: openai.OpenAI) -> None:
    whole = chat(client, response_format=STRICT, seed=5).choices[0].message.content
    chunks = chat(client, response_format=STRICT, seed=5, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole
    assert len(pieces) > 3


@pytest.mark.slow
def test_a_json_object_a_pattern_and_a_grammar(client: openai.OpenAI) -> None:
    text = chat(client, response_format={"type": "json_object"}, temperature=0.0)
    assert isinstance(json.loads(text.choices[0].message.content), dict)
    digits = chat(client, extra_body={"regex": "[0-9]{3}-[0-9]{4}"}).choices[0].message.content
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", digits)
    answer = chat(client, extra_body={"ebnf": 'root ::= "yes" | "no"'}).choices[0]
    assert answer.message.content in ("yes", "no")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("named", [False, True], ids=["required", "named"])
def test_a_forced_tool_is_called_with_arguments_of_its_schema(
    client: openai.OpenAI, named: bool, stream: bool
) -> None:
    choice: Any = {"type": "function", "function": {"name": "wait"}} if named else "required"
    ask = [{"role": "user", "content": "Wait for three seconds."}]
    answer = chat(
        client, tools=TOOLS, tool_choice=choice, messages=ask, temperature=0.5, stream=stream
    )
    calls: dict[int, tuple[str, str]] = {}
    if stream:
        deltas = [chunk.choices[0].delta.tool_calls or () for chunk in answer if chunk.choices]
        for call in (call for delta in deltas for call in delta):
            name, arguments = calls.get(call.index, ("", ""))
            calls[call.index] = (
                name + (call.function.name or ""),
                arguments + (call.function.arguments or ""),
            )
    else:
        for index, call in enumerate(answer.choices[0].message.tool_calls):
            calls[index] = (call.function.name, call.function.arguments)
    assert calls
    for name, arguments in calls.values():
        value = json.loads(arguments)
        if name == "wait":
            assert 1 <= value["seconds"] <= 9
        else:
            assert (name, list(value), named) == ("read_file", ["path"], False)


@pytest.mark.slow
def test_stop_strings_and_logprobs_work_beside_a_constraint(client: openai.OpenAI) -> None:
    cut = chat(client, response_format=STRICT, stop=['"age"']).choices[0]
    assert cut.finish_reason == "stop"
    assert '"age"' not in cut.message.content
    reported = chat(client, response_format=STRICT, logprobs=True, top_logprobs=2).choices[0]
    entries = reported.logprobs.content
    assert "".join(entry.token for entry in entries) == reported.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


@pytest.mark.slow
def _workers(server: Serve) -> list[psutil.Process]:
    """The processes that try constraints out, but for those that end at this moment."""
    found = []
    for process in server.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "tokenspeed.grammar.worker" in process.cmdline():
                found.append(process)
    return found


def test_a_client_that_leaves_while_its_constraint_is_compiled_leaves_nothing(
    coder: Serve,
) -> None:
    with coder.servicer() as channel:
        stub = pb_grpc.TokenSpeedSchedulerStub(channel)
        for stream in (False, True):
            request = pb.GenerateRequest(
                request_id=f"slow-{stream}",
                tokenized=pb.TokenizedInput(input_ids=[1, 2, 3]),
                stream=stream,
            )
            request.sampling_params.ebnf_grammar = SLOW.text
            call = stub.Generate(request)
            worker = wait_for(
                lambda: _workers(coder),
                lambda found: len(found) > 1,
            )
            if stream:
                assert stub.Abort(pb.AbortRequest(request_id=request.request_id)).success
                assert [m.complete.finish_reason for m in call] == ["abort"]
            else:
                call.cancel()
                with pytest.raises(grpc.RpcError):
                    list(call)
            wait_for(
                lambda: _workers(coder),
                lambda found: len(found) == 1,
            )
            assert worker
        assert coder.wait_until_idle(channel)["pages_active"] == 0


@pytest.fixture(scope="module")
def llm(smollm2: ModelFiles) -> Iterator[LLM]:
    with LLM(str(smollm2.path), max_context=512, max_running=8) as loaded:
        yield loaded


def test_offline_each_kind_of_constraint_holds(llm: LLM) -> None:
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"json": {"type": "integer", "minimum": 5, "maximum": 8}}, "[5-8]"),
        ({"regex": "a{2,4}b"}, "a{2,4}b"),
        ({"choice": ("left", "right")}, "left|right"),
        ({"grammar": 'root ::= [xyz] "!"+ "?"'}, r"[xyz]!+\?"),
    ]
    params = [
        SamplingParams(
            temperature=1.5,
            seed=3,
            max_new_tokens=40,
            min_new_tokens=30,
            ignore_eos=True,
            structured_outputs=StructuredOutputs(**kind),
        )
        for kind, _ in kinds
    ]
    outputs = llm.generate(["Say something:"] * len(kinds), params, n=3)
    for output, (_, pattern) in zip(outputs, kinds, strict=True):
        for completion in output.completions:
            if completion.finish_reason is FinishReason.STOP:
                assert re.fullmatch(pattern, completion.text), completion.text
                assert completion.stop in llm.info.eos_token_ids


def test_offline_a_free_request_beside_confined_ones_keeps_its_tokens(llm: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_new_tokens=24, ignore_eos=True)
    confined = SamplingParams(
        temperature=0.0, max_new_tokens=24, structured_outputs=StructuredOutputs(regex="[a-z ]+")
    )
    prompt = "The capital of France is"
    alone = llm.generate(prompt, free)[0].completions[0].token_ids
    together = llm.generate([prompt] * 3, [confined, free, confined])
    assert together[1].completions[0].token_ids == alone
    assert re.fullmatch("[a-z ]+", together[0].completions[0].text)


def test_offline_what_cannot_be_enforced_is_refused_and_the_rest_ends(llm: LLM) -> None:
    wrong = SamplingParams(structured_outputs=StructuredOutputs(json={"uniqueItems": True}))
    with pytest.raises(InvalidParameter, match="uniqueItems"):
        llm.generate(["a", "b"], [SamplingParams(max_new_tokens=400, ignore_eos=True), wrong])
    assert llm.stats().running == llm.stats().waiting == 0
    assert llm.stats().pages_active == 0


def test_an_engine_process_streams_confined_text_and_refuses_what_it_cannot_enforce(
    smollm2: ModelFiles,
) -> None:
    async def run() -> None:
        async with await AsyncLLM.start(str(smollm2.path), max_context=512) as llm:
            params = SamplingParams(
                temperature=1.0,
                max_new_tokens=24,
                structured_outputs=StructuredOutputs(regex="[a-z]{3}-[0-9]{2}"),
            )
            pieces = [delta.text async for delta in llm.generate("Code:", params)]
            assert re.fullmatch("[a-z]{3}-[0-9]{2}", "".join(pieces))
            wrong = SamplingParams(structured_outputs=StructuredOutputs(regex="(?=a)b"))
            with pytest.raises(InvalidParameter, match="look"):
                async for _ in llm.generate("Code:", wrong):
                    pass
            # Whoever leaves while the constraint is compiled leaves nothing behind.
            slow = SamplingParams(structured_outputs=SLOW)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    async for _ in llm.generate("Code:", slow):
                        pass
            stats = await llm.stats()
            assert (stats.running, stats.waiting, stats.pages_active) == (0, 0, 0)

    asyncio.run(run())
