"""Clients that go away leave nothing behind in the engine."""

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

from .serving import Serve, wait_for

STREAMS = 200
AT_ONCE = 16


def drop(server: Serve, *, stream: bool, after_chunks: int) -> None:
    """Ask for a long answer, and close the connection after some chunks or, where the answer
    comes whole, some time."""
    body = json.dumps(
        {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": "Tell a long story."}],
            "max_tokens": 900,
            "stream": stream,
            "ignore_eos": True,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(head.encode() + body)
        if not stream:
            connection.settimeout(0.01 + 0.1 * after_chunks)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            return
        seen = 0
        while seen < after_chunks:
            seen += connection.recv(65536).count(b'"content":')


@pytest.mark.slow
def test_two_hundred_dropped_streams_give_every_page_back(server: Serve) -> None:
    seed = 20
    rng = random.Random(seed)
    drops = [(rng.random() < 0.7, rng.randrange(6)) for _ in range(STREAMS)]
    with server.servicer() as channel:
        before = server.wait_until_idle(channel)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            waits = [
                pool.submit(drop, server, stream=stream, after_chunks=count)
                for stream, count in drops
            ]
            for wait in waits:
                wait.result()
        after = server.wait_until_idle(channel)
    assert after["output_tokens"] < before["output_tokens"] + STREAMS * 300, "streams ran on"
    assert after["pages_active"] == 0
    assert after["pages_free"] + after["pages_cached"] == after["pages_total"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_ended_call_gives_its_pages_back_within_two_steps(server: Serve, stream: bool) -> None:
    with server.servicer() as channel:
        stub = pb_grpc.TokenSpeedSchedulerStub(channel)
        for count in range(5):
            server.wait_until_idle(channel)
            request_id = f"dropped-{stream}-{count}"
            request = pb.GenerateRequest(
                request_id=request_id,
                tokenized=pb.TokenizedInput(input_ids=range(100, 140)),
                sampling_params=pb.SamplingParams(max_new_tokens=900, ignore_eos=True),
                stream=stream,
            )
            call = stub.Generate(request)
            if stream:
                for _ in range(count + 1):
                    next(call)
                assert stub.Abort(pb.AbortRequest(request_id=request_id)).success
                assert list(call)[-1].complete.finish_reason == "abort"
            else:
                wait_for(lambda: server.counters(channel), lambda found: found["running"] == 1)
                call.cancel()
            # The call has ended here; steps from now on are counted.
            at_end = server.counters(channel)
            idle = server.wait_until_idle(channel)
            assert idle["steps"] - at_end["steps"] <= 2
            assert idle["pages_active"] == 0
