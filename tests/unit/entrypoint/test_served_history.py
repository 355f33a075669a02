"""A second turn, through the servicer: what the engine is asked for, and what the gateway hears."""

from typing import Any

import grpc
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed.entrypoint.servicer import Servicer

from .scripted_engine import ScriptedEngine
from .test_servicer import served

# Letters; token 20 is "aa".
FIRST = [10, 11] * 80
ANSWER = [10, 11, 12, 13]


def request(ids: list[int], name: str, **params: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=name,
        tokenized=pb.TokenizedInput(input_ids=ids),
        sampling_params=pb.SamplingParams(**params),
    )


def as_it_came_back(ids: list[int]) -> list[int]:
    """The same letters with each pair "aa" as one token."""
    return [int(token) for token in " ".join(map(str, ids)).replace("10 10", "20").split()]


async def answered(stub: Any, engine: ScriptedEngine, asked: pb.GenerateRequest) -> Any:
    """The last message of a call."""
    index = len(engine.streams)
    call = stub.Generate(asked)
    await engine.wait_for_requests(index + 1)
    for number in range(index, index + (asked.sampling_params.n or 1)):
        engine.finish(number, len(ANSWER))
    return [message async for message in call][-1].complete


def test_a_text_that_comes_back_is_served_as_the_same_tokens() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        first = [*FIRST, 10, 10, 10]
        await answered(stub, engine, request(first, "one"))
        again = as_it_came_back([*first, *ANSWER, 15])
        assert again == [*FIRST, 20, 20, 11, 12, 13, 15]
        complete = await answered(stub, engine, request(again, "two"))
        assert engine.prompts[1] == [*first, *ANSWER, 15]
        # As many as the gateway sent, whatever was served.
        assert complete.prompt_tokens == len(again)
        assert servicer.history is not None
        assert (servicer.history.prompts, servicer.history.replaced_tokens) == (1, 2)
        info = await stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.scheduler_info["history_replaced_tokens"] == 2

    served(case)


def test_each_sample_is_remembered() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        await answered(stub, engine, request(FIRST, "one", n=3))
        assert engine.prompts == [FIRST] * 3
        assert servicer.history is not None
        assert servicer.history.sequences == 3

    served(case)


def test_tenants_and_a_flushed_cache_share_nothing() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        ending = "-00000000-0000-0000-0000-000000000000"
        first = [*FIRST, 10, 10, 10]
        again = as_it_came_back([*first, *ANSWER, 15])
        await answered(stub, engine, request(first, f"tenant=one{ending}"))
        await answered(stub, engine, request(again, f"tenant=two{ending}"))
        assert engine.prompts[-1] == again
        await stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=1.0))
        await answered(stub, engine, request(again, f"tenant=one/x{ending}"))
        assert engine.prompts[-1] == again

    served(case)


def test_an_answer_that_was_given_up_is_remembered_as_far_as_it_came() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        asked = request([*FIRST, 10, 10, 10], "one")
        asked.stream = True
        call = stub.Generate(asked)
        await engine.wait_for_requests(1)
        engine.streams[0].push(10, 0)
        await call.read()
        await stub.Abort(pb.AbortRequest(request_id="one"))
        while await call.read() is not grpc.aio.EOF:
            pass
        await answered(stub, engine, request([*FIRST, 20, 20, 15], "two"))
        assert engine.prompts[1] == [*FIRST, 10, 10, 10, 10, 15]

    served(case)


def test_without_token_exact_history_prompts_are_served_as_they_come() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        first = [*FIRST, 10, 10, 10]
        again = as_it_came_back([*first, *ANSWER, 15])
        for number, ids in enumerate([first, again]):
            await answered(stub, engine, request(ids, str(number)))
        assert engine.prompts == [first, again]
        assert servicer.history is None

    served(case, servicer=Servicer(token_exact_history=False))
