"""All of the server serves, or none of it is left."""

import signal
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import openai
import psutil
import pytest
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

from tokenspeed.loader import ModelFiles

from .serving import Serve, run_cli, wait_for

BODY = {
    "model": "smollm2-135m",
    "messages": [{"role": "user", "content": "Tell a long story."}],
    "max_tokens": 400,
    "ignore_eos": True,
}


def long_stream(server: Serve, tokens: int) -> str:
    """Stream until the end; the error that ended it."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        try:
            for _ in client.chat.completions.create(
                model=BODY["model"],
                messages=BODY["messages"],
                max_tokens=tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                pass
        except openai.OpenAIError as error:
            return str(error)
    return ""


def under_load(server: Serve, pool: ThreadPoolExecutor, tokens: int = 400) -> list[Future[str]]:
    """Four streams that have begun."""
    with server.servicer() as channel:
        streams = [pool.submit(long_stream, server, tokens) for _ in range(4)]
        wait_for(
            lambda: server.counters(channel),
            lambda found: found["running"] == len(streams) and found["output_tokens"] >= 8,
        )
    return streams


@pytest.mark.slow
def test_ctrl_c_ends_every_process_and_is_no_failure(smollm2: ModelFiles, tmp_path: Path) -> None:
    with Serve(tmp_path / "log") as server:
        family = server.family()
        assert len(family) == 3
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []


@pytest.mark.slow
def test_a_killed_engine_is_reported_to_clients_and_ends_the_server(
    smollm2: ModelFiles, tmp_path: Path
) -> None:
    with (
        Serve(tmp_path / "log") as server,
        ThreadPoolExecutor(4) as pool,
        server.servicer() as channel,
    ):
        stub = pb_grpc.TokenSpeedSchedulerStub(channel)
        events = stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest())
        assert next(events).events[0].HasField("cleared")
        streams = under_load(server, pool)
        assert next(events).events[0].stored.blocks[0].block_size == 32
        family = server.family()
        server.engine().kill()
        assert all(stream.result(60) for stream in streams)
        with pytest.raises(grpc.RpcError) as caught:
            list(events)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(60) == 1
        log = server.log.read_text()
        assert "killed by SIGKILL" in log
        assert "Traceback" not in log
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []


@pytest.mark.slow
def test_with_restart_an_engine_that_is_killed_or_hangs_is_replaced(
    smollm2: ModelFiles, tmp_path: Path
) -> None:
    with Serve(tmp_path / "log", "--restart") as server, ThreadPoolExecutor(4) as pool:
        for lose, said in (
            (psutil.Process.kill, "killed by SIGKILL"),
            (psutil.Process.suspend, "does nothing"),
        ):
            streams = under_load(server, pool)
            lost = server.engine()
            lose(lost)
            assert all(stream.result(60) for stream in streams)
            wait_for(
                lambda: server.post("/v1/chat/completions", BODY | {"max_tokens": 4}),
                lambda answer: answer[0] == 200,
                timeout_s=120,
            )
            assert server.engine().pid != lost.pid
            assert said in server.log.read_text()


@pytest.mark.slow
def test_sigterm_lets_streams_end_and_refuses_new_ones(smollm2: ModelFiles, tmp_path: Path) -> None:
    with (
        Serve(tmp_path / "log", "--no-curl", "--shutdown-timeout", "60") as server,
        ThreadPoolExecutor(4) as pool,
    ):
        operations = server.operations_url()
        family = server.family()
        assert len(family) == 3
        streams = under_load(server, pool)
        server.process.send_signal(signal.SIGTERM)
        # Until the signal is seen, a request is served.
        status, answer = wait_for(
            lambda: server.post("/v1/chat/completions", BODY | {"max_tokens": 1}),
            lambda answer: answer[0] != 200,
        )
        assert (status, "draining" in str(answer)) == (429, True), answer
        resumed = httpx.post(f"{operations}/resume", timeout=30, trust_env=False)
        assert resumed.status_code == 409, resumed.text
        assert [stream.result(60) for stream in streams] == [""] * 4
        assert server.process.wait(60) == 0
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []


@pytest.mark.slow
def test_a_second_sigterm_ends_all_at_once(smollm2: ModelFiles, tmp_path: Path) -> None:
    with (
        Serve(tmp_path / "log", "--shutdown-timeout", "600") as server,
        ThreadPoolExecutor(4) as pool,
    ):
        family = server.family()
        # More than they get to.
        streams = under_load(server, pool, tokens=6000)
        server.process.send_signal(signal.SIGTERM)
        wait_for(
            lambda: server.post("/v1/chat/completions", BODY | {"max_tokens": 1}),
            lambda answer: answer[0] != 200,
        )
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 130
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
        for stream in streams:
            stream.result(60)


@pytest.mark.slow
def test_a_killed_supervisor_leaves_no_process(smollm2: ModelFiles, tmp_path: Path) -> None:
    with Serve(tmp_path / "log") as server:
        family = server.family()
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []


def test_a_port_in_use_is_reported_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        result = run_cli("serve", "no-such-model", "--port", str(port))
    assert result.returncode == 1
    assert f"cannot serve on 127.0.0.1:{port}" in result.stderr
    assert "--port" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_that_is_not_there_ends_the_server_with_its_name() -> None:
    result = run_cli("serve", "./no/such/model.gguf", "--port", "18899")
    assert result.returncode == 1
    assert "no/such/model.gguf" in result.stderr
    assert "Traceback" not in result.stderr
