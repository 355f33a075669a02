"""What the client measures is what the server did."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.support.paced_server import Pace, PacedServer, words_of
from tests.unit.bench.live_support import SteppedServer, Steps, session, workload
from tokenspeed.bench import live
from tokenspeed.bench.sessions import Workload
from tokenspeed.core.errors import ConfigError, MeasurementError

TALK = workload(session("a", ("one two three", 5), ("four", 4)), session("b", ("five six", 3)))


def run(server: PacedServer, asked: live.Pass, work: Workload = TALK, **options: Any) -> live.Run:
    async def go() -> live.Run:
        async with live.ChatClient(server.url) as client:
            await client.find_model()
            return await live.replay(client, work, asked, **options)

    return asyncio.run(go())


def stepped(pace: Pace, work: Workload, **options: Any) -> live.Run:
    """A run of one user in which only the server's schedule takes time."""

    async def go() -> live.Run:
        clock = Steps()
        async with (
            SteppedServer(pace, clock) as server,
            live.ChatClient(server.url, clock=clock) as client,
        ):
            await client.find_model()
            return await live.replay(client, work, live.Pass(users=1), clock=clock, **options)

    return asyncio.run(go())


def test_measured_times_are_the_schedule_exactly() -> None:
    found = stepped(Pace(first_s=lambda body: 0.25 * words_of(body), token_s=0.02), TALK)
    first, second, third = found.answers
    assert first.piece_us == tuple(1_000_000 + 20_000 * k for k in range(5))
    # The second turn's prompt: salt, three words, an answer of five, one word.
    assert second.piece_us == tuple(2_500_000 + 20_000 * k for k in range(4))
    assert third.piece_us == (750_000, 770_000, 790_000)
    assert (first.sent_us, second.sent_us, third.sent_us) == (0, 1_080_000, 3_640_000)
    assert [answer.ended_us for answer in found.answers] == [1_080_000, 2_560_000, 790_000]
    assert found.window_us == 4_430_000
    summary = live.summarise_run(found, floor_tps=50.0)
    assert summary.tps is not None and summary.ttft_s is not None
    assert (summary.tps.p1, summary.tps.max) == pytest.approx((50.0, 50.0))
    assert summary.ttft_s.p50 == pytest.approx(1.0)
    assert [(wait.turns, wait.answers) for wait in summary.ttft_by_turn] == [("0", 2), ("1-4", 1)]
    assert summary.ttft_by_turn[1].ttft_s.p50 == pytest.approx(2.5)
    assert summary.interval_ms is not None
    assert (summary.interval_ms.p50, summary.interval_ms.max) == pytest.approx((20.0, 20.0))
    assert summary.output_tokens == 12
    assert summary.output_tpm == pytest.approx(12 * 60 / 4.43)
    assert summary.tokens_per_piece == 1.0
    assert summary.goodput is not None and summary.goodput.answers_part == 1.0


def test_the_servers_own_answers_are_the_history() -> None:
    with PacedServer() as server:
        found = run(server, live.Pass(users=1, salt="s"))
    assert [answer.error for answer in found.answers] == [None] * 3
    first, second, third = (served.body for served in server.served)
    assert first["messages"] == [{"role": "user", "content": "[s] one two three"}]
    said = "".join(f"t1-{index} " for index in range(5))
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": said},
        {"role": "user", "content": "four"},
    ]
    assert third["messages"] == [{"role": "user", "content": "[s] five six"}]
    assert [body["max_tokens"] for body in (first, second, third)] == [5, 4, 3]
    assert first["ignore_eos"] is True and first["min_tokens"] == 5
    assert [answer.output_tokens for answer in found.answers] == [5, 4, 3]


def test_measured_times_lie_between_what_the_server_did_before_and_after() -> None:
    with PacedServer(Pace(token_s=0.01)) as server:
        clock_zero: list[float] = []

        def clock() -> float:
            now_s = time.perf_counter()
            clock_zero.append(now_s)
            return now_s

        found = run(server, live.Pass(users=1), clock=clock)
    # The run's own clock is looked at first when it begins.
    start_s = clock_zero[0]
    for index, (answer, served) in enumerate(zip(found.answers, server.served, strict=True)):
        sent_s = start_s + answer.sent_us / 1e6
        rounding_s = 2e-6
        assert sent_s <= served.received_s + rounding_s
        for piece_us, wrote_s in zip(answer.piece_us, served.token_s, strict=True):
            assert wrote_s <= sent_s + piece_us / 1e6 + rounding_s
        if index + 1 < len(server.served):
            ended_s = sent_s + answer.ended_us / 1e6
            assert ended_s <= server.served[index + 1].received_s + rounding_s


def test_as_many_sessions_are_open_as_there_are_users() -> None:
    work = workload(*(session(name, ("x", 2), ("y", 2)) for name in "abcdef"))
    open_now, most = set[str](), [0]

    def refusal(body: dict[str, Any]) -> None:
        open_now.add(body["messages"][0]["content"])
        most[0] = max(most[0], len(open_now))
        if len(body["messages"]) == 3:
            open_now.discard(body["messages"][0]["content"])

    names = workload(
        *(session(f"{n}", (f"x{n}", 2), (f"y{n}", 2)) for n in range(len(work.sessions)))
    )
    with PacedServer(Pace(token_s=0.01, refusal=refusal)) as server:
        found = run(server, live.Pass(users=3), names)
    assert len(found.answers) == 12
    assert most[0] == 3
    assert 0 < found.full_load_us <= found.window_us


def test_a_new_pass_over_the_sessions_has_another_salt() -> None:
    with PacedServer(Pace(token_s=0.005)) as server:
        found = run(server, live.Pass(users=2, duration_s=2.0, salt="s"))
    assert found.window_us == 2_000_000
    heads = [served.body["messages"][0]["content"].split()[0] for served in server.served]
    assert {"[s]", "[s-1]"} <= set(heads)
    assert {answer.session for answer in found.answers} >= {"a", "b", "a#1"}
    # A user may look at the clock just before the end, and send just behind it, but once.
    assert sum(answer.sent_us > 2_000_000 for answer in found.answers) <= 2


def test_no_tool_outlasts_the_run() -> None:
    (first,) = workload(session("a", ("x", 2), ("y", 2))).sessions
    slow = dataclasses.replace(first.turns[1], gap_s=3600.0)
    work = workload(dataclasses.replace(first, turns=(first.turns[0], slow)))
    with PacedServer() as server:
        found = run(server, live.Pass(users=1, duration_s=0.5), work)
    assert [answer.turn for answer in found.answers] == [0]
    assert found.stopped is None


def test_runs_have_salts_of_their_own() -> None:
    with PacedServer() as server:
        salts = {run(server, live.Pass(users=1)).salt for _ in range(3)}
    assert len(salts) == 3


def test_an_open_loop_sends_requests_at_their_times_and_not_after_each_other() -> None:
    work = workload(
        *(session(f"{n}", (f"x{n}", 2), start_s=at) for n, at in enumerate((0.0, 0.2, 0.4)))
    )

    async def until_all_came(seconds: float) -> None:
        """The first answer waits for the last request, if that comes at all."""
        give_up_s = time.monotonic() + 30
        while seconds and len(server.served) < 3 and time.monotonic() < give_up_s:
            await asyncio.sleep(0.001)

    pace = Pace(first_s=lambda body: float("x0" in str(body["messages"])))
    with PacedServer(pace, pause=until_all_came) as server:
        found = run(server, live.Pass(users=None, speed=2.0), work)
    assert [answer.session for answer in found.answers] == ["0", "1", "2"]
    for answer, at in zip(found.answers, (0.0, 0.1, 0.2), strict=True):
        assert answer.sent_us >= at * 1e6
    assert len(server.served) == 3 and server.served[2].received_s < server.served[0].token_s[0]
    with PacedServer() as server, pytest.raises(ConfigError, match="--concurrency"):
        run(server, live.Pass(users=None), TALK)


def test_an_answer_that_is_not_as_long_as_asked_is_counted() -> None:
    with PacedServer(Pace(tokens_max=4)) as server:
        summary = live.summarise_run(run(server, live.Pass(users=1)))
    assert (summary.answers, summary.errors, summary.wrong_lengths) == (3, 0, 1)
    assert summary.output_tokens == 4 + 4 + 3


def test_without_usage_a_piece_counts_as_a_token_and_that_is_told() -> None:
    with PacedServer(Pace(with_usage=False)) as server:
        summary = live.summarise_run(run(server, live.Pass(users=1)))
    assert (summary.uncounted, summary.output_tokens) == (3, 12)
    assert summary.cached_part_by_usage is None and summary.prompt_tokens == 0


def test_a_failed_answer_ends_its_session_and_not_the_run() -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (503, "no engine") if "one" in str(body["messages"]) else None

    with PacedServer(Pace(refusal=refuse)) as server:
        found = run(server, live.Pass(users=1))
    first, second = found.answers
    assert first.error is not None and "HTTP 503" in first.error and "no engine" in first.error
    assert second.error is None and found.stopped is None
    summary = live.summarise_run(found)
    assert (summary.answers, summary.errors, summary.output_tokens) == (2, 1, 3)
    assert summary.error_kinds == {first.error: 1}


def test_an_error_within_a_stream_is_an_error() -> None:
    with PacedServer(Pace(broken_at=2)) as server:
        found = run(server, live.Pass(users=1))
    assert all("out of order" in (answer.error or "") for answer in found.answers)
    assert live.summarise_run(found).output_tokens == 0


def test_a_stream_that_ends_early_is_an_error() -> None:
    with PacedServer(Pace(cut_at=2)) as server:
        found = run(server, live.Pass(users=1))
    assert ["[DONE]" in (answer.error or "") for answer in found.answers] == [True, True]
    assert found.stopped is None


def test_too_many_failures_in_a_row_end_the_run() -> None:
    work = workload(*(session(f"{n}", ("x", 1)) for n in range(9)))
    with PacedServer(Pace(refusal=lambda body: (500, "broken"))) as server:
        found = run(server, live.Pass(users=1, errors_max=3), work)
    assert len(found.answers) == 3
    assert found.stopped is not None and "3 answers in a row" in found.stopped
    assert "broken" in found.stopped


def test_a_killed_server_ends_the_run_with_what_was_measured() -> None:
    command = [sys.executable, "-m", "tests.support.paced_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        ended: list[live.AnswerRecord] = []

        def watch(answer: live.AnswerRecord) -> None:
            ended.append(answer)
            if len(ended) == 5:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()

        async def go() -> live.Run:
            async with live.ChatClient(f"http://127.0.0.1:{port}/v1") as client:
                await client.find_model()
                asked = live.Pass(users=3, duration_s=3600)
                return await live.replay(client, TALK, asked, watch=watch)

        found = asyncio.run(go())
    assert found.stopped is not None and "went away" in found.stopped
    summary = live.summarise_run(found)
    assert summary.answers - summary.errors >= 5
    assert 1 <= summary.errors <= 3
    # Rates are over the time until then, not over the hour asked for.
    assert summary.window_s < 3600 and summary.output_tpm > 0


def test_a_server_that_is_not_there_is_a_clear_error() -> None:
    async def go() -> None:
        async with live.ChatClient("http://127.0.0.1:9") as client:
            await client.find_model()

    with pytest.raises(MeasurementError, match=r"no server answers at http://127\.0\.0\.1:9"):
        asyncio.run(go())


def test_a_server_that_refuses_what_forces_lengths_is_asked_without() -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str] | None:
        return (400, "unknown field") if "ignore_eos" in body else None

    with PacedServer(Pace(refusal=refuse)) as server:

        async def go() -> bool:
            async with live.ChatClient(server.url) as client:
                await client.find_model()
                await live.warm_up(client)
                return client.forces_lengths

        assert asyncio.run(go()) is False
    with PacedServer(Pace(refusal=lambda body: (400, "never"))) as server:

        async def fail() -> None:
            async with live.ChatClient(server.url) as client:
                await client.find_model()
                await live.warm_up(client)

        with pytest.raises(MeasurementError, match="never"):
            asyncio.run(fail())


def test_calibration_finds_the_time_of_a_prompts_token() -> None:
    async def go() -> live.Calibration:
        clock = Steps()
        pace = Pace(first_s=lambda body: 0.02 + 0.001 * words_of(body))
        async with (
            SteppedServer(pace, clock) as server,
            live.ChatClient(server.url, clock=clock) as client,
        ):
            await client.find_model()
            return await live.calibrate(client)

    found = asyncio.run(go())
    assert found.token_us == pytest.approx(1000)
    assert found.base_us == pytest.approx(20_000)


def test_cached_tokens_show_in_usage_and_in_first_tokens() -> None:
    """A server that computes half of each second prompt, and says a quarter is cached."""
    calibration = live.Calibration(base_us=20_000, token_us=1000)

    def first_s(body: dict[str, Any]) -> float:
        part = 1.0 if len(body["messages"]) == 1 else 0.5
        return 0.02 + 0.001 * part * words_of(body)

    pace = Pace(first_s=first_s, cached_tokens=lambda body: words_of(body) // 4)
    work = workload(session("a", ("word " * 99, 10), ("word " * 90, 1)))
    summary = live.summarise_run(stepped(pace, work, calibration=calibration))
    # Prompts of 100 and 200 words, of which none and 100 were not computed.
    assert summary.prompt_tokens == 300
    assert summary.cached_part_by_ttft == pytest.approx(100 / 300)
    assert summary.cached_part_by_usage == pytest.approx(75 / 300)
    assert summary.computed_prompt_tpm == pytest.approx(summary.prompt_tpm * 0.75)


def test_a_run_that_is_interrupted_keeps_what_was_measured() -> None:
    async def go() -> live.Run:
        ended: list[live.AnswerRecord] = []

        def watch(answer: live.AnswerRecord) -> None:
            ended.append(answer)
            if len(ended) == 4:
                task.cancel()

        async with live.ChatClient(server.url) as client:
            await client.find_model()
            asked = live.Pass(users=2, duration_s=3600)
            task = asyncio.create_task(live.replay(client, TALK, asked, watch=watch))
            return await task

    with PacedServer(Pace(token_s=0.002)) as server:
        found = asyncio.run(go())
    assert found.stopped == "interrupted"
    assert len(found.answers) >= 4 and found.window_us < 3600e6


def test_a_server_behind_a_supervisor_is_found_by_its_port() -> None:
    program = (
        "import subprocess, sys\n"
        "command = [sys.executable, '-m', 'tests.support.paced_server']\n"
        "with subprocess.Popen(command, start_new_session=True) as child:\n"
        "    sys.stdin.read()\n"
        "    child.kill()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdin is not None and supervisor.stdout is not None
        port = int(supervisor.stdout.readline())
        assert live.find_server(f"http://127.0.0.1:{port}") == supervisor.pid
        supervisor.stdin.close()


def test_a_servers_cpu_time_and_memory_are_measured() -> None:
    program = "import sys\nfor line in sys.stdin:\n sum(range(10**7))\n print(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        meter = live.ProcessMeter([process.pid])
        with meter:
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
        usage = meter.usage()
        process.stdin.close()
    assert usage.pids == (process.pid,)
    assert usage.cpu_s > 0
    assert usage.rss_max_bytes > 2**20
    with pytest.raises(ConfigError, match="--pid"):
        live.ProcessMeter([process.pid])


def test_a_server_is_found_by_its_port() -> None:
    command = [sys.executable, "-m", "tests.support.paced_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert live.find_server(f"http://127.0.0.1:{port}") == process.pid
        assert live.find_server(f"http://example.org:{port}") is None
        process.kill()
    with PacedServer():
        assert live.find_server(f"http://127.0.0.1:{port}") is None
