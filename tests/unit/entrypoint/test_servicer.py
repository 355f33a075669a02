"""The servicer over a real gRPC connection, with an engine that follows a script."""

import asyncio
import hashlib
import io
import zipfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.core.errors import EngineDead, InvalidParameter, Overloaded
from tokenspeed.core.step import FinishReason
from tokenspeed.engine.stream import TokenLogprob
from tokenspeed.engine.wire import CacheEventBatch
from tokenspeed.entrypoint.generation import Generation, GenerationTable
from tokenspeed.entrypoint.servicer import Servicer, start_server
from tokenspeed.entrypoint.ticks import WriteTicks
from tokenspeed.entrypoint.tokenizer_archive import CHUNK_SIZE_BYTES

from .scripted_engine import EOS, ScriptedEngine

Case = Callable[[Any, ScriptedEngine, Servicer], Awaitable[None]]


def served(
    case: Case, *, engine: ScriptedEngine | None = None, servicer: Servicer | None = None
) -> None:
    """Run a case against a servicer on a port of its own."""

    async def run(servicer: Servicer) -> None:
        scripted = engine or ScriptedEngine()
        servicer.attach(scripted)  # type: ignore[arg-type]
        server, port = await start_server(servicer)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = pb_grpc.TokenSpeedSchedulerStub(channel)
                await asyncio.wait_for(case(stub, scripted, servicer), 30)
        finally:
            await server.stop(None)

    asyncio.run(run(servicer or Servicer()))


def generate_request(**fields: Any) -> pb.GenerateRequest:
    params = {
        name: fields.pop(name) for name in ("n", "no_stop_trim", "sampling_seed") if name in fields
    }
    return pb.GenerateRequest(
        request_id=fields.pop("request_id", "r"),
        tokenized=pb.TokenizedInput(input_ids=[1, 5, 6]),
        sampling_params=pb.SamplingParams(**params),
        **fields,
    )


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return caught.value.code(), caught.value.details()


def test_chunks_are_deltas_and_complete_holds_all() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request(stream=True))
        await engine.wait_for_requests(1)
        stream = engine.streams[0]
        seen: list[int] = []
        for token in (10, 11):
            stream.push(token, 3)
            chunk = (await call.read()).chunk
            assert list(chunk.token_ids) == [token]
            seen += chunk.token_ids
            assert chunk.completion_tokens == len(seen)
            assert (chunk.prompt_tokens, chunk.cached_tokens) == (3, 3)
        stream.push(12, 3)
        stream.push_end(FinishReason.LENGTH)
        assert list((await call.read()).chunk.token_ids) == [12]
        complete = (await call.read()).complete
        assert list(complete.output_ids) == [10, 11, 12]
        assert (complete.finish_reason, complete.completion_tokens) == ("length", 3)
        assert await call.read() is grpc.aio.EOF

    served(case)


def test_tokens_that_waited_share_a_chunk() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request(stream=True))
        await engine.wait_for_requests(1)
        engine.finish(0, 5)
        assert list((await call.read()).chunk.token_ids) == [10, 11, 12, 13, 14]

    served(case)


def test_without_stream_there_is_one_message() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request())
        await engine.wait_for_requests(1)
        engine.finish(0, 4)
        messages = [message async for message in call]
        assert [message.WhichOneof("response") for message in messages] == ["complete"]
        assert list(messages[0].complete.output_ids) == [10, 11, 12, 13]

    served(case)


@pytest.mark.parametrize("kept", [False, True])
def test_a_stop_token_is_in_the_output_only_if_asked_for(kept: bool) -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request(stream=True, no_stop_trim=kept))
        await engine.wait_for_requests(1)
        engine.finish(0, 1, with_eos=True)
        *chunks, complete = [message async for message in call]
        expected = [10, EOS] if kept else [10]
        assert [token for chunk in chunks for token in chunk.chunk.token_ids] == expected
        assert list(complete.complete.output_ids) == expected
        assert complete.complete.matched_token_id == EOS
        assert (complete.complete.finish_reason, complete.complete.completion_tokens) == (
            "stop",
            2,
        )

    served(case)


def test_samples_are_fanned_out_with_seeds_of_their_own() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request(n=3, sampling_seed=40))
        await engine.wait_for_requests(3)
        assert [params.seed for params in engine.params] == [40, 41, 42]
        for index in (2, 0, 1):
            engine.finish(index, index + 1)
        lengths = {m.complete.index: len(m.complete.output_ids) async for m in call}
        assert lengths == {0: 1, 1: 2, 2: 3}

    served(case)


def test_logprobs_travel_with_their_tokens() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request(stream=True, return_logprob=True, top_logprobs_num=2))
        await engine.wait_for_requests(1)
        assert engine.params[0].logprobs == 2
        for token in (10, EOS):
            engine.streams[0].push_logprob(TokenLogprob(-0.5, [token, 7], [-0.5, -1.5]))
            engine.streams[0].push(token, 0, is_stop=token == EOS)
        engine.streams[0].push_end(FinishReason.STOP, stop_token_id=EOS)
        chunk, complete = [message async for message in call]
        for logprobs in (chunk.chunk.output_logprobs, complete.complete.output_logprobs):
            assert list(logprobs.token_ids) == [10]
            assert list(logprobs.token_logprobs) == [-0.5]
            assert list(logprobs.top_logprobs[0].token_ids) == [10, 7]
            assert list(logprobs.top_logprobs[0].values) == [-0.5, -1.5]

    served(case)


def test_abort_ends_the_stream_and_the_engines_request() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request(request_id="a", stream=True))
        await engine.wait_for_requests(1)
        assert (await stub.Abort(pb.AbortRequest(request_id="a"))).success
        (last,) = [message async for message in call]
        assert last.complete.finish_reason == "abort"
        assert engine.aborted == [0]
        assert not (await stub.Abort(pb.AbortRequest(request_id="a"))).success

    served(case)


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_call_ends_every_sample(stream: bool) -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request(n=2, stream=stream))
        await engine.wait_for_requests(2)
        call.cancel()
        while servicer.running:
            await asyncio.sleep(0)
        assert sorted(engine.aborted) == [0, 1]

    served(case)


def test_a_finished_call_aborts_nothing() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request())
        await engine.wait_for_requests(1)
        engine.finish(0, 1)
        assert len([message async for message in call]) == 1
        assert engine.aborted == []
        assert servicer.running == 0

    served(case)


def test_an_id_in_flight_is_refused_and_its_owner_goes_on() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        first = stub.Generate(generate_request(request_id="same"))
        await engine.wait_for_requests(1)
        code, details = await refused(stub.Generate(generate_request(request_id="same")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "same" in details
        engine.finish(0, 1)
        assert len([message async for message in first]) == 1

    served(case)


def test_an_engine_that_dies_ends_its_streams_with_unavailable() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request(n=2))
        await engine.wait_for_requests(2)
        for stream in engine.streams:
            stream.fail(EngineDead("killed"))
        assert await refused(call) == (grpc.StatusCode.UNAVAILABLE, "killed")

    served(case)


def test_without_an_engine_calls_are_unavailable_and_health_says_why() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy
        servicer.detach("it was killed")
        answer = await stub.HealthCheck(pb.HealthCheckRequest())
        assert (answer.healthy, answer.message) == (False, "it was killed")
        for call in (
            stub.Generate(generate_request()),
            stub.GetModelInfo(pb.GetModelInfoRequest()),
            stub.GetServerInfo(pb.GetServerInfoRequest()),
            stub.GetLoads(pb.GetLoadsRequest()),
            stub.FlushCache(common_pb2.FlushCacheRequest()),
            stub.StartProfile(common_pb2.StartProfileRequest()),
            stub.StopProfile(common_pb2.StopProfileRequest()),
            stub.GetTokenizer(common_pb2.GetTokenizerRequest()),
            stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()),
        ):
            assert await refused(call) == (grpc.StatusCode.UNAVAILABLE, "it was killed")
        servicer.attach(engine)  # type: ignore[arg-type]
        assert (await stub.HealthCheck(pb.HealthCheckRequest())).healthy

    served(case)


def test_health_follows_the_engine() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        engine.dead = True
        assert not (await stub.HealthCheck(pb.HealthCheckRequest())).healthy

    served(case)


def test_a_constraint_reaches_the_engine_and_its_refusal_the_client() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        request = generate_request(n=2, stream=True)
        request.sampling_params.json_schema = '{"uniqueItems":true}'
        call = stub.Generate(request)
        await engine.wait_for_requests(2)
        for params in engine.params:
            assert params.structured_outputs == StructuredOutputs(json='{"uniqueItems":true}')
        engine.streams[1].fail(InvalidParameter("uniqueItems cannot be enforced"))
        code, details = await refused(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "uniqueItems" in details
        assert engine.aborted == [0]

    served(case)


def test_a_request_that_can_never_fit_is_an_invalid_argument() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request())
        await engine.wait_for_requests(1)
        engine.streams[0].push_end(FinishReason.REJECTED)
        code, details = await refused(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "--kv-cache-memory" in details

    served(case)


def test_a_refused_request_is_exhausted_and_says_when_to_come_back() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request(stream=True))
        await engine.wait_for_requests(1)
        engine.streams[0].fail(Overloaded("retry after 7 s", retry_after_s=7.2))
        code, details = await refused(call)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details == "retry after 7 s"
        assert ("retry-after", "8") in list(await call.trailing_metadata())

    served(case)


@pytest.mark.parametrize(
    ("request_id", "tenant"),
    [
        ("tenant=acme-01a1fd01-5796-7694-bcfb-da66891a6e2e", "acme"),
        ("tenant=acme-2/turn-9-01a1fd01-5796-7694-bcfb-da66891a6e2e", "acme-2"),
        ("chatcmpl-01a1fd01-5796-7694-bcfb-da66891a6e2e", None),
        ("tenant=acme", None),
        ("tenant=-01a1fd01-5796-7694-bcfb-da66891a6e2e", None),
    ],
)
def test_the_tenant_is_what_the_request_id_names(request_id: str, tenant: str | None) -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.Generate(generate_request(request_id=request_id))
        await engine.wait_for_requests(1)
        assert engine.tenants == [tenant]
        engine.finish(0, 1)
        assert [message async for message in call]

    served(case)


def test_the_salt_of_a_tenant_is_another_in_each_server() -> None:
    salts: list[int] = []

    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        request_id = "tenant=ann-0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f"
        call = stub.Generate(generate_request(request_id=request_id, stream=True))
        await engine.wait_for_requests(1)
        engine.finish(0, 1)
        assert [message async for message in call]
        salts.extend(engine.salts)

    served(case)
    served(case)
    assert len(set(salts)) == 2


def test_model_info_names_the_model_and_its_limits() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        info = await stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.served_model_name, list(info.eos_token_ids)) == ("scripted", [EOS])
        assert (info.max_context_length, info.vocab_size) == (512, 1000)
        assert info.default_sampling_params_json == '{"temperature":0.5,"top_k":7}'

    served(case)


def test_server_info_and_loads_carry_the_counters() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        info = await stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.scheduler_info["pages_free"] == 32
        assert info.server_args["page_size"] == 4
        assert info.active_requests == 3
        loads = await stub.GetLoads(pb.GetLoadsRequest(include=["all"]))
        (load,) = loads.loads
        assert (load.num_running_reqs, load.num_waiting_uncached_tokens) == (2, 9)
        assert (load.token_usage, load.active_token_usage) == (0.5, 0.25)
        assert load.cache_hit_rate == 0.25
        assert load.memory.token_capacity == 256
        assert load.queues.waiting == 1
        (core,) = (await stub.GetLoads(pb.GetLoadsRequest())).loads
        assert not core.HasField("memory")
        for request in (pb.GetLoadsRequest(include=["x"]), pb.GetLoadsRequest(dp_rank=1)):
            assert (await refused(stub.GetLoads(request)))[0] is grpc.StatusCode.INVALID_ARGUMENT

    served(case)


def test_flush_and_profile_reach_the_engine(tmp_path: Path) -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        assert not (await stub.FlushCache(common_pb2.FlushCacheRequest())).success
        assert (await stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=1))).success
        started = await stub.StartProfile(
            common_pb2.StartProfileRequest(output_dir=str(tmp_path), num_steps=2)
        )
        assert started.message == f"{tmp_path}/trace-2"
        assert (await stub.StopProfile(common_pb2.StopProfileRequest())).message == "trace"
        for call in (
            stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=float("nan"))),
            stub.StartProfile(common_pb2.StartProfileRequest(start_step=4)),
            stub.StartProfile(common_pb2.StartProfileRequest(num_steps=0)),
            stub.StartProfile(common_pb2.StartProfileRequest(output_dir=str(tmp_path / "no"))),
        ):
            assert (await refused(call))[0] is grpc.StatusCode.INVALID_ARGUMENT

    served(case)


def test_the_tokenizer_travels_in_chunks_without_the_weights(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 3 * CHUNK_SIZE_BYTES, dtype=np.uint8)
    (tmp_path / "tokenizer.json").write_bytes(noise.tobytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")

    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        chunks = [c async for c in stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
        data = b"".join(chunk.data for chunk in chunks)
        assert max(len(chunk.data) for chunk in chunks) <= CHUNK_SIZE_BYTES
        assert [chunk.sha256 for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)
        assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.namelist() == ["tokenizer.json", "tokenizer_config.json"]
            assert archive.read("tokenizer.json") == noise.tobytes()

    served(case, engine=ScriptedEngine(tmp_path))


def cache_batch(events: list[tuple[int, int, int | None]]) -> CacheEventBatch:
    """A batch of (kind, hash, parent); the tokens of stored pages count up."""
    stored = sum(kind == 0 for kind, *_ in events)
    return CacheEventBatch(
        sequence=1,
        kinds=np.array([kind for kind, *_ in events], np.int32).tobytes(),
        hashes=np.array([page for _, page, _ in events], np.int64).tobytes(),
        parents=np.array([parent or 0 for *_, parent in events], np.int64).tobytes(),
        has_parent=np.array([parent is not None for *_, parent in events], np.bool_).tobytes(),
        tokens=np.arange(4 * stored, dtype=np.int32).tobytes(),
    )


def test_cache_events_arrive_in_order_with_the_load() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        request = common_pb2.SubscribeKvEventsRequest(start_sequence_number=7)
        call = stub.SubscribeKvEvents(request)
        engine.cache.put_nowait(
            cache_batch([(2, 0, None), (0, -5, None), (0, 6, -5), (0, 9, -5), (1, 6, None)])
        )
        first = await call.read()
        assert first.sequence_number == 8
        assert first.load.running_requests == 2
        kinds = [event.WhichOneof("data") for event in first.events]
        assert kinds == ["cleared", "stored", "stored", "removed"]
        chain, branch = first.events[1].stored, first.events[2].stored
        assert [block.block_hash for block in chain.blocks] == [-5, 6]
        assert not chain.HasField("parent_block_hash")
        assert [list(block.token_ids) for block in chain.blocks] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert branch.parent_block_hash == -5
        assert list(branch.blocks[0].token_ids) == [8, 9, 10, 11]
        assert list(first.events[3].removed.block_hashes) == [6]
        engine.cache.put_nowait(cache_batch([(1, 9, None)]))
        assert (await call.read()).sequence_number == 9
        call.cancel()

    served(case)


def test_a_large_batch_of_cache_events_is_cut() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        call = stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())
        engine.cache.put_nowait(
            cache_batch([(0, page, page - 1 if page else None) for page in range(1500)])
        )
        first, second = await call.read(), await call.read()
        assert (first.sequence_number, second.sequence_number) == (1, 2)
        assert [len(m.events[0].stored.blocks) for m in (first, second)] == [1024, 476]
        assert second.events[0].stored.parent_block_hash == 1023
        call.cancel()

    served(case)


def test_many_streams_wait_for_a_whole_interval_and_few_for_none() -> None:
    table = GenerationTable(0.4)
    engine = ScriptedEngine()

    def generation(number: int, samples: int) -> Generation:
        request = generate_request(request_id=str(number), n=samples)
        return Generation(request, engine)  # type: ignore[arg-type]

    ticks = table.ticks
    assert ticks.tick_s() == 0.0
    with ExitStack() as stack:
        for number in range(4):
            stack.enter_context(table.listed(generation(number, 2)))
        assert ticks.tick_s() == pytest.approx(8 / 20 * 0.1)
        for number in range(4, 40):
            stack.enter_context(table.listed(generation(number, 8)))
        assert ticks.tick_s() == 0.1
        # Whenever a stream asks, it is told of the same tick.
        at_s = (7.01, 7.05, 7.09)
        assert [ticks.next_s(now_s, 0.0) for now_s in at_s] == pytest.approx([7.1] * 3)
        # What has been coming for long waits longer, until others write as well.
        ages_s = (0.4, 0.6, 0.9, 1.1, 3600.0)
        told_s = [ticks.next_s(7.05, age_s) for age_s in ages_s]
        assert told_s == pytest.approx([7.1, 7.2, 7.2, 7.2, 7.2])
        assert ticks.next_s(7.25, 0.6) == pytest.approx(7.4)
        assert ticks.next_s(7.25, 1.1) == pytest.approx(7.6)
    assert ticks.next_s(7.05, 9.0) == 7.05
    assert ticks.tick_s() == 0.0


def test_whoever_rests_is_woken_at_its_own_tick_whoever_else_rests() -> None:
    class Clock(asyncio.SelectorEventLoop):
        """A loop whose clock stands where the test puts it."""

        now_s = 7.05

        def time(self) -> float:
            return self.now_s

        async def move(self, now_s: float) -> None:
            self.now_s = now_s
            for _ in range(5):
                await asyncio.sleep(0)

    class Sleeper:
        """Rests once."""

        def __init__(self, first_token_s: float) -> None:
            self.first_token_s: float | None = first_token_s
            self._woken = asyncio.Event()

        async def rest(self) -> None:
            await self._woken.wait()

        def end_rest(self) -> None:
            self._woken.set()

    async def case() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Clock)
        ticks = WriteTicks(0.4)
        ticks.streams = 20
        await loop.move(6.85)
        # The oldest rests first, until long after the others are woken.
        rests = [asyncio.ensure_future(ticks.rest(Sleeper(6.85 - age))) for age in (9.0, 0.6, 0.0)]

        async def woken(now_s: float) -> list[bool]:
            await loop.move(now_s)
            return [rest.done() for rest in rests]

        assert await woken(6.89) == [False, False, False]
        assert await woken(6.9) == [False, False, True]
        assert await woken(7.0) == [False, True, True]
        assert await woken(7.19) == [False, True, True]
        assert await woken(7.2) == [True, True, True]

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(case())


def test_between_a_streams_first_and_last_message_tokens_wait_for_the_interval() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        requests = [generate_request(request_id=str(n), stream=True) for n in range(20)]
        calls = [stub.Generate(request) for request in requests]
        await engine.wait_for_requests(20)
        for token in (3, 4, 5):
            for stream in engine.streams:
                stream.push(token, 0)
            if token == 3:
                # At once, or this would wait for an hour.
                assert [list((await call.read()).chunk.token_ids) for call in calls] == [[3]] * 20
            # Whoever does not wait has written before this is answered.
            await stub.HealthCheck(pb.HealthCheckRequest())
        for stream in engine.streams:
            stream.push_end(FinishReason.LENGTH)
        for call in calls:
            chunk, complete = await call.read(), await call.read()
            assert list(chunk.chunk.token_ids) == [4, 5]
            assert list(complete.complete.output_ids) == [3, 4, 5]

    served(case, servicer=Servicer(stream_interval_s=3600.0))


def test_a_call_without_an_id_is_refused() -> None:
    async def case(stub: Any, engine: ScriptedEngine, servicer: Servicer) -> None:
        code, _ = await refused(stub.Generate(generate_request(request_id="")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT

    served(case)
