"""The operations port over real connections, with an engine that follows a script."""

import asyncio
import json
import socket
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

from tokenspeed.core.errors import ConfigError, EngineDead
from tokenspeed.core.step import FinishReason
from tokenspeed.engine.facts import RequestTimes
from tokenspeed.entrypoint.operations.server import OperationsConfig, OperationsServer
from tokenspeed.entrypoint.servicer import Servicer, start_server

from .scripted_engine import ScriptedEngine

UUID = "01234567-89ab-cdef-0123-456789abcdef"
KEY = "s3cret"


class Scene:
    """A servicer with its operations port, and a client of each."""

    def __init__(self, servicer: Servicer, engine: ScriptedEngine) -> None:
        self.servicer = servicer
        self.engine = engine
        self.http: httpx.AsyncClient
        self.stub: Any
        self.operations: OperationsServer

    async def until(self, path: str, fits: Callable[[httpx.Response], bool]) -> httpx.Response:
        """Ask until the answer fits."""
        async with asyncio.timeout(60):
            while not fits(answer := await self.http.get(path)):
                await asyncio.sleep(0.01)
        return answer

    def call(self, request_id: str, prompt: list[int] | None = None) -> Any:
        return self.stub.Generate(
            pb.GenerateRequest(
                request_id=request_id,
                tokenized=pb.TokenizedInput(input_ids=prompt or [1, 5, 6]),
                stream=True,
            )
        )

    async def ended(self, request_id: str, index: int, prompt: list[int] | None = None) -> Any:
        """Run a request of two tokens to its end; what the port tells of it."""
        call = self.call(request_id, prompt)
        await self.engine.wait_for_requests(index + 1)
        stream = self.engine.streams[index]
        stream.push(10, 3)
        stream.push(11, 3)
        assert stream.first_token_s is not None
        first_us = round(stream.first_token_s * 1e6)
        stream.times = RequestTimes(
            constraint_us=0,
            queue_us=40,
            restore_us=0,
            prefill_us=60,
            stall_us=0,
            decode_us=500_000,
            first_token_at_us=first_us,
            ended_at_us=first_us + 500_000,
        )
        stream.push_end(FinishReason.LENGTH)
        while await call.read() is not grpc.aio.EOF:
            pass
        answer = await self.until(f"/requests/{request_id}", lambda a: a.json()["state"] == "ended")
        return answer.json()


Case = Callable[[Scene], Awaitable[None]]


def watched(case: Case, **options: Any) -> None:
    """Run a case against a servicer and its operations port, both on ports of their own."""

    async def run() -> None:
        servicer = Servicer()
        scene = Scene(servicer, ScriptedEngine())
        servicer.attach(scene.engine)  # type: ignore[arg-type]
        config = OperationsConfig(near_port=0, **options)
        scene.operations = await OperationsServer.start([servicer], config)
        server, port = await start_server(servicer)
        url = scene.operations.url
        transport = None
        if url.startswith("unix:"):
            transport = httpx.AsyncHTTPTransport(uds=url.removeprefix("unix:"))
            url = "http://localhost"
        try:
            async with (
                httpx.AsyncClient(base_url=url, transport=transport, trust_env=False) as http,
                grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            ):
                scene.http = http
                scene.stub = pb_grpc.TokenSpeedSchedulerStub(channel)
                await asyncio.wait_for(case(scene), 60)
        finally:
            await scene.operations.stop()
            await server.stop(None)

    asyncio.run(run())


def test_every_route_answers() -> None:
    async def case(scene: Scene) -> None:
        await scene.ended("r", 0)
        for path in ("/health", "/ready", "/status", "/sessions", "/cache", "/requests"):
            answer = await scene.http.get(path)
            assert answer.status_code == 200, (path, answer.text)
            assert isinstance(answer.json(), dict)
        cache = (await scene.http.get("/cache")).json()
        assert cache["device"] == {"total": 64, "free": 32, "cached": 16, "active": 16}
        status = (await scene.http.get("/status")).json()
        assert status["engine"]["model_name"] == "scripted"
        # Paths of the machine are nobody's business.
        assert "tokenizer_dir" not in status["engine"]

    watched(case)


def test_the_phases_of_a_request_add_up_to_its_total() -> None:
    async def case(scene: Scene) -> None:
        view = await scene.ended(f"start=1000000000000/x-{UUID}", 0)
        (sample,) = view["samples"]
        phases = sample["phases_ms"]
        # A start in 2001 is a mistake of the client's: nothing is known of the gateway.
        assert phases["gateway"] is None
        told = sum(spent for spent in phases.values() if spent is not None)
        assert told == pytest.approx(view["total_ms"], abs=1e-6)
        assert phases["queue"] <= 0.04
        assert (view["outcome"], view["output_tokens"], view["prompt_tokens"]) == ("length", 2, 3)
        assert view["tokens_per_s"] == 2.0

    watched(case)


def test_a_client_that_says_when_it_sent_a_request_sees_the_gateway_s_share() -> None:
    async def case(scene: Scene) -> None:
        loop_ms = int(time.time() * 1000) - 2_000
        view = await scene.ended(f"tenant=a/start={loop_ms}-{UUID}", 0)
        (sample,) = view["samples"]
        assert sample["phases_ms"]["gateway"] >= 2_000
        assert view["tenant"] == "a"
        told = sum(spent for spent in sample["phases_ms"].values() if spent is not None)
        assert told == pytest.approx(view["total_ms"], abs=1e-6)

    watched(case)


def test_a_request_is_found_by_what_its_client_sent_too() -> None:
    async def case(scene: Scene) -> None:
        await scene.ended(f"mine/1-{UUID}", 0)
        answer = await scene.http.get("/requests/mine/1")
        assert answer.json()["id"] == f"mine/1-{UUID}"
        assert (await scene.http.get("/requests/other")).status_code == 404

    watched(case)


def test_running_requests_are_shown_with_where_they_are() -> None:
    async def case(scene: Scene) -> None:
        call = scene.call("live")
        await scene.engine.wait_for_requests(1)
        scene.engine.streams[0].push(10, 3)
        answer = await scene.until("/requests/live", lambda a: a.json()["output_tokens"] == 1)
        view = answer.json()
        assert view["state"] == "running"
        assert view["ttft_ms"] is not None
        listed = (await scene.http.get("/requests")).json()
        assert [one["id"] for one in listed["running"]] == ["live"]
        sessions = (await scene.http.get("/sessions")).json()["sessions"]
        assert [one["id"] for one in sessions[0]["running"]] == ["live"]
        call.cancel()

    watched(case)


def test_a_drained_server_ends_what_runs_and_takes_nothing_new_until_it_is_resumed() -> None:
    async def case(scene: Scene) -> None:
        running = scene.call("before")
        await scene.engine.wait_for_requests(1)
        assert (await scene.http.post("/drain")).json() == {"draining": True, "in_flight": 1}
        assert (await scene.http.get("/ready")).status_code == 503
        assert (await scene.http.get("/health")).status_code == 200
        refused = scene.call("during")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata() or ())["retry-after"] == "5"
        scene.engine.finish(0, 3)
        assert list((await running.read()).chunk.token_ids) == [10, 11, 12]
        assert (await scene.http.post("/resume")).json()["draining"] is False
        assert (await scene.http.get("/ready")).status_code == 200
        scene.call("after")
        await scene.engine.wait_for_requests(2)

    watched(case)


def test_a_server_that_goes_down_is_not_resumed() -> None:
    async def case(scene: Scene) -> None:
        scene.servicer.draining = scene.servicer.ending = True
        answer = await scene.http.post("/resume")
        assert answer.status_code == 409
        assert answer.json() == {"error": "the server is going down"}
        assert (await scene.http.get("/ready")).status_code == 503

    watched(case)


def test_health_follows_progress_not_answers() -> None:
    async def case(scene: Scene) -> None:
        # The script's engine has work, and its steps stand still.
        sick = await scene.until("/health", lambda a: a.status_code == 503)
        assert "no step was run" in sick.json()["reason"]
        assert (await scene.http.get("/ready")).status_code == 503

        def goes_on(answer: httpx.Response) -> bool:
            # One step makes it healthy for so short a time that nobody may see it.
            scene.engine.steps += 1
            return answer.status_code == 200

        await scene.until("/health", goes_on)
        scene.servicer.detach("the engine ended with exit code 9")
        gone = await scene.until("/health", lambda a: a.status_code == 503)
        assert gone.json()["reason"] == "the engine ended with exit code 9"
        assert (await scene.http.get("/cache")).status_code == 503
        metrics = (await scene.http.get("/metrics")).text
        assert "tokenspeed_healthy 0.0" in metrics
        assert "tokenspeed_pages" not in metrics

    watched(case, health_timeout_s=0.05)


def test_an_engine_that_answers_nothing_is_unhealthy_only_while_it_has_requests() -> None:
    async def case(scene: Scene) -> None:
        scene.engine.dead = True
        await scene.http.get("/metrics")
        assert (await scene.http.get("/health")).status_code == 200
        scene.engine.dead = False
        scene.call("r")
        await scene.engine.wait_for_requests(1)
        scene.engine.dead = True
        await scene.until("/health", lambda a: a.status_code == 503)

    # Long enough to be asked while it is well, however busy the machine is.
    watched(case, health_timeout_s=1.0)


def test_metrics_count_requests_and_show_the_engine() -> None:
    async def case(scene: Scene) -> None:
        await scene.ended("r", 0)
        refused = scene.stub.Generate(pb.GenerateRequest(request_id=""))
        with pytest.raises(grpc.aio.AioRpcError):
            await refused.read()
        answer = await scene.until("/metrics", lambda a: 'outcome="invalid"' in a.text)
        assert answer.headers["content-type"].startswith("text/plain")
        lines = answer.text.splitlines()
        for line in (
            'tokenspeed_requests_total{outcome="length"} 1.0',
            'tokenspeed_requests_total{outcome="invalid"} 1.0',
            "tokenspeed_time_to_first_token_seconds_count 1.0",
            'tokenspeed_user_tokens_per_second_bucket{le="2.0"} 1.0',
            'tokenspeed_queue_wait_seconds_bucket{le="0.001"} 1.0',
            'tokenspeed_requests_now{state="waiting"} 1.0',
            'tokenspeed_pages{state="cached",tier="device"} 16.0',
            'tokenspeed_missed_tokens_total{cause="evicted"} 10.0',
            "tokenspeed_cached_tokens_total 25.0",
            'tokenspeed_preemptions_total{kind="retraction"} 0.0',
            'tokenspeed_tier_bytes_total{direction="store"} 0.0',
            'tokenspeed_step_seconds_total{part="forward"} 0.0',
            'tokenspeed_inter_token_seconds_bucket{le="0.0015"} 0.0',
            "tokenspeed_floor_violations_total 0.0",
            "tokenspeed_healthy 1.0",
        ):
            assert line in lines, line

    watched(case)


def test_turns_of_a_conversation_are_one_session() -> None:
    async def case(scene: Scene) -> None:
        first = [*range(100, 180)]
        await scene.ended(f"tenant=a/1-{UUID}", 0, first)
        await scene.ended(f"tenant=a/2-{UUID}", 1, [*first, 10, 11, *range(300, 340)])
        await scene.ended(f"tenant=b/1-{UUID}", 2, [*range(100, 120), *range(500, 560)])
        sessions = (await scene.http.get("/sessions")).json()["sessions"]
        assert [(s["tenant"], s["requests"]) for s in sessions] == [("b", 1), ("a", 2)]
        assert sessions[1]["context_tokens"] == 124

    watched(case)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:80", 421),
        ("evil.example@127.0.0.1", 200),
        ("[", 421),
        ("10.0.0.1", 421),
    ],
)
def test_names_that_are_not_this_machine_s_are_refused(host: str, status: int) -> None:
    async def case(scene: Scene) -> None:
        answer = await scene.http.get("/health", headers={"host": host})
        assert answer.status_code == status, answer.text

    watched(case)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_page_elsewhere_drains_nobody(headers: dict[str, str]) -> None:
    async def case(scene: Scene) -> None:
        answer = await scene.http.post("/drain", headers=headers)
        assert answer.status_code == 403
        assert not scene.servicer.draining

    watched(case)


def test_hostile_requests_are_refused_and_the_port_lives_on() -> None:
    async def case(scene: Scene) -> None:
        http = scene.http
        assert (await http.get("/requests/" + "x" * 4000)).status_code == 414
        assert (await http.get("/requests/" + "x" * 1000)).status_code == 404
        assert (await http.get("/requests/%00%ff%2e%2e%2fetc")).status_code == 404
        assert (await http.get("/metrics?" + "a" * 4000)).status_code == 414
        assert (await http.get("/drain")).status_code == 405
        assert (await http.post("/metrics")).status_code == 405
        assert (await http.request("TRACE", "/health")).status_code == 405
        assert (await http.get("/../../etc/passwd")).status_code == 404
        assert (await http.post("/chat", content=b"x" * 2_000_000)).status_code == 413
        # The chat box has no gateway here.
        assert (await http.post("/chat", json={})).status_code == 503
        scene.operations.connect("http://127.0.0.1:1", scene.engine.info)
        for body, status in (
            (b"{", 400),
            (b'{"messages": []}', 400),
            (b'{"messages": [{"role": "tool", "content": "x"}]}', 400),
            (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e99}', 400),
            (b'{"messages": [{"role": "user", "content": "x"}], "n": 9}', 400),
            (b'{"messages": [{"role": "user", "content": "x"}]}', 502),
            (b"[" * 100_000, 400),
        ):
            answer = await http.post(
                "/chat", content=body, headers={"content-type": "application/json"}
            )
            assert answer.status_code == status, (body[:80], answer.text)
        assert (await http.post("/chat", content=b"{}")).status_code == 415
        for raw in (
            b"GARBAGE\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
            b"POST /drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
            b"POST /drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999\r\n\r\n",
            b"POST /drain HTTP/1.1\r\n\r\n",
        ):
            assert (await _raw(scene.operations.url, raw)).split(b" ")[1].startswith(b"4"), raw
        assert not scene.servicer.draining
        assert (await http.get("/health")).status_code == 200

    watched(case)


async def _raw(url: str, data: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    answer = await reader.readline()
    writer.close()
    return answer


def test_a_chunked_body_that_never_ends_is_cut_off() -> None:
    async def case(scene: Scene) -> None:
        scene.operations.connect("http://127.0.0.1:1", scene.engine.info)

        async def endless() -> Any:
            while True:
                yield b"x" * 65536

        with pytest.raises(httpx.HTTPError):
            await scene.http.post(
                "/chat", content=endless(), headers={"content-type": "application/json"}
            )
        assert (await scene.http.get("/health")).status_code == 200

    watched(case)


def test_with_a_key_only_health_and_the_empty_page_are_open() -> None:
    async def case(scene: Scene) -> None:
        for path in ("/", "/health", "/ready"):
            assert (await scene.http.get(path)).status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
            for path in ("/metrics", "/status", "/sessions", "/cache", "/requests", "/none"):
                answer = await scene.http.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
            assert (await scene.http.post("/drain", headers=headers)).status_code == 401
        assert not scene.servicer.draining
        allowed = {"authorization": f"Bearer {KEY}"}
        assert (await scene.http.get("/metrics", headers=allowed)).status_code == 200

    watched(case, api_key=KEY)


def test_a_unix_socket_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "operations.sock"

    async def case(scene: Scene) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await scene.http.get("/health")).status_code == 200
        with pytest.raises(ConfigError, match="somebody listens"):
            await OperationsServer.start([scene.servicer], OperationsConfig(socket_path=path))

    watched(case, socket_path=path)
    assert not path.exists()
    path.write_text("not ours")
    with pytest.raises(ConfigError, match="--operations-socket"):
        watched(case, socket_path=path)
    assert path.read_text() == "not ours"


def test_a_named_port_that_is_taken_is_an_error_and_an_unnamed_one_is_not() -> None:
    async def run() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match="--operations-port"):
                await OperationsServer.start([Servicer()], OperationsConfig(port=port))
            made = await OperationsServer.start([Servicer()], OperationsConfig(near_port=port))
            assert not made.url.endswith(f":{port}")
            await made.stop()

    asyncio.run(run())


def test_the_port_is_exposed_only_with_a_key() -> None:
    with pytest.raises(ConfigError, match="--operations-host"):
        OperationsConfig(host="0.0.0.0")
    OperationsConfig(host="0.0.0.0", api_key=KEY)
    for health_timeout_s in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="--health-timeout"):
            OperationsConfig(health_timeout_s=health_timeout_s)


def test_a_dead_engine_leaves_requests_with_what_is_known() -> None:
    async def case(scene: Scene) -> None:
        call = scene.call("r")
        await scene.engine.wait_for_requests(1)
        scene.engine.streams[0].fail(EngineDead("killed"))
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        answer = await scene.http.get("/requests/r")
        assert json.loads(answer.text)["id"] == "r"

    watched(case)
