"""`tokenspeed bench replay` and `compare` against real HTTP servers."""

import contextlib
import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.paced_server import Pace, PacedServer
from tokenspeed.cli.main import app

TERMINAL = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
LINES = [
    {
        "session_id": name,
        "system_prompt": "be brief",
        "turns": [
            {
                "input_delta": [{"role": "user", "content": f"{name} {turn}"}],
                "output_tokens": 4,
                "pre_gap_ms": 1,
            }
            for turn in range(3)
        ],
    }
    for name in ("one", "two", "three")
]


@pytest.fixture
def sessions(tmp_path: Path) -> Path:
    path = tmp_path / "sessions.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


def invoke(*line: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *line])
    return result.exit_code, result.stdout, result.stderr


def test_a_sweep_writes_a_report_a_picture_and_a_page(tmp_path: Path, sessions: Path) -> None:
    folder = tmp_path / "out"
    with PacedServer(Pace(token_s=0.002)) as server:
        code, out, _ = invoke(
            *("replay", server.url, "--sessions", str(sessions), "--concurrency", "1,2"),
            *("--repeats", "2", "--output", str(folder), "--label", "paced", "--json"),
        )
        served = len(server.served)
    assert code == 0
    report = json.loads(out)
    assert report == json.loads((folder / "report.json").read_text())
    assert [(run["users"], run["repeat"]) for run in report["runs"]] == [
        (1, 0), (1, 1), (2, 0), (2, 1)
    ]  # fmt: skip
    assert all((run["answers"], run["errors"]) == (9, 0) for run in report["runs"])
    # Four runs of nine turns, one prompt to warm up and six to calibrate.
    assert served == 4 * 9 + 7
    assert [level["users"] for level in report["levels"]] == [1, 2]
    assert report["plan"]["model"] == "paced"
    assert (folder / "frontier.png").exists() and "paced" in (folder / "report.html").read_text()
    code, out, _ = invoke("compare", str(folder / "report.json"), str(folder / "report.json"))
    assert code == 0 and "TPS of a user, p50" in out and "1.000" in out


def test_the_table_names_what_was_measured(sessions: Path) -> None:
    with PacedServer(Pace(token_s=0.002, tokens_max=3)) as server:
        code, out, _ = invoke(
            "replay", server.url, "--sessions", str(sessions), "--concurrency", "2"
        )
    assert code == 0
    words = " ".join(out.split())
    for word in ("TPS of", "output TPM", "TTFT", "interval", "cached", "errors", "frontier"):
        assert word in words
    assert "9 answers have not the length that was asked for" in words


def test_drawn_sessions_can_be_replayed() -> None:
    with PacedServer() as server:
        code, out, error = invoke(
            *("replay", server.url, "--synthetic", "swe", "--sessions-max", "2", "--json"),
            *("--turns-max", "2", "--output-tokens", "3", "--concurrency", "1"),
            *("--tool-gap-scale", "0"),
        )
    assert code == 0, error
    report = json.loads(out)
    assert report["plan"]["turns"] == 4
    assert report["runs"][0]["output_tokens"] == 12


def test_a_trace_is_sent_at_its_times(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 10 * n, "input_length": 20, "output_length": 2, "hash_ids": [n]}
        for n in range(4)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    with PacedServer() as server:
        code, out, error = invoke("replay", server.url, "--sessions", str(trace), "--json")
    assert code == 0, error
    (run,) = json.loads(out)["runs"]
    assert (run["users"], run["answers"], run["errors"]) == (None, 4, 0)


def test_a_killed_server_leaves_a_report_and_the_same_command_goes_on(
    tmp_path: Path, sessions: Path
) -> None:
    folder = tmp_path / "out"
    line = (
        *("--sessions", str(sessions), "--concurrency", "1,3,2", "--output", str(folder)),
        *("--label", "paced", "--output-tokens", "20"),
    )
    command = [sys.executable, "-m", "tests.support.paced_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())

        def kill() -> None:
            # Seven to warm up, nine of the first run, four of the second.
            assert process.stdout is not None
            for _ in range(7 + 9 + 4):
                process.stdout.readline()
            process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        code, out, error = invoke("replay", f"http://127.0.0.1:{port}", *line)
        killer.join()
    assert code == 1
    assert "went away" in error and f"127.0.0.1:{port}" in error
    assert "TPS" in out
    report = json.loads((folder / "report.json").read_text())
    assert "went away" in report["incomplete"]
    assert "1 more runs were not begun" in report["incomplete"]
    whole, broken = report["runs"]
    assert (whole["users"], whole["answers"], whole["stopped"]) == (1, 9, None)
    assert broken["users"] == 3 and broken["output_tokens"] >= 4 * 20 and broken["errors"] >= 1
    assert (folder / "report.html").exists()
    with PacedServer(Pace(token_s=0.002)) as server:
        code, _, error = invoke("replay", server.url, *line)
        # The first run was kept: only the others are measured.
        assert len(server.served) == 7 + 9 + 9
    assert code == 0, error
    finished = json.loads((folder / "report.json").read_text())
    assert finished["incomplete"] is None
    assert finished["runs"][0] == whole
    assert [(run["users"], run["answers"], run["errors"]) for run in finished["runs"][1:]] == [
        (2, 9, 0),
        (3, 9, 0),
    ]


def test_a_server_that_only_fails_is_an_error(sessions: Path) -> None:
    with PacedServer(Pace(refusal=lambda body: (503, "no engine"))) as server:
        code, _, error = invoke("replay", server.url, "--sessions", str(sessions))
    assert code == 1 and "no engine" in error


def test_what_cannot_be_measured_is_said_before_anything_is_sent(
    tmp_path: Path, sessions: Path
) -> None:
    document = tmp_path / "document.json"
    document.write_text('{"conversations": [[{"messages": [{"role": "user", "content": "x"}]}]]}')
    for line, message in (
        (["--sessions", str(sessions), "--synthetic", "swe"], "either"),
        ([], "either"),
        (["--sessions", str(sessions), "--concurrency", "1,x"], "--concurrency"),
        (["--sessions", str(sessions), "--concurrency", "0"], "--concurrency"),
        (["--sessions", str(document)], "--output-tokens"),
        (["--sessions", str(sessions), "--duration", "0"], "--duration"),
        (["--sessions", str(sessions), "--speed", "0"], "--speed"),
        (["--sessions", str(sessions), "--max-context", "3"], "--max-context"),
        (["--sessions", str(sessions), "--pid", "4194304"], "--pid"),
    ):
        with PacedServer() as server:
            code, _, error = invoke("replay", server.url, *line)
            assert code == 1 and message in error, (line, error)
            assert not [served for served in server.served if served.body["max_tokens"] == 4]
    code, _, error = invoke("replay", "http://127.0.0.1:9", "--sessions", str(sessions))
    assert code == 1 and "no server answers" in error


def test_a_terminal_shows_bars_and_live_figures(sessions: Path) -> None:
    """On a terminal of its own, wide enough for everything."""
    with PacedServer(Pace(token_s=0.002)) as server:
        command = [sys.executable, "-m", "tokenspeed.cli", "bench", "replay", server.url]
        command += ["--sessions", str(sessions), "--concurrency", "1,2"]
        master, slave = pty.openpty()
        with subprocess.Popen(
            command, stdin=slave, stdout=subprocess.DEVNULL, stderr=slave, env=TERMINAL
        ) as process:
            os.close(slave)
            shown = b""
            # Linux ends a terminal nobody writes to any more with an error.
            with contextlib.suppress(OSError):
                while piece := os.read(master, 65536):
                    shown += piece
            os.close(master)
            assert process.wait() == 0
    text = shown.decode()
    for words in ("run 1 of 2: 1 users", "run 2 of 2: 2 users", "output tokens a minute"):
        assert words in text
    assert "1 users, repeat 0: 9 answers" in text
