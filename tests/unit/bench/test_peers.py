"""Engines take turns, each with a server of its own for every run."""

import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.unit.bench.live_support import session, workload
from tokenspeed.bench import live, peers
from tokenspeed.bench.peers import servers
from tokenspeed.core.errors import ConfigError, MeasurementError

TALK = workload(session("a", ("one two three", 5), ("four", 4)), session("b", ("five six", 3)))
ROOT = Path(__file__).parents[3]


def paced(name: str, starts: list[tuple[str, int]]) -> object:
    """A recipe that starts the paced server in place of an engine."""

    def launch(wanted: servers._Wanted) -> peers.Launch:
        starts.append((name, wanted.users))
        return peers.Launch(
            command=(sys.executable, "-m", "tests.support.paced_server", str(wanted.port)),
            variables={"PYTHONPATH": str(ROOT)},
        )

    return launch


def comparison(*engines: str, repeats: int = 2) -> peers.PeerComparison:
    return peers.PeerComparison(
        model="paced",
        engines=engines,
        levels=(1, 2),
        repeats=repeats,
        each=live.Pass(users=1),
        threads=1,
        context=1000,
        floor_tps=None,
        ttft_max_s=None,
    )


def test_engines_alternate_and_broken_off_comparisons_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[tuple[str, int]] = []
    recipes = {name: paced(name, starts) for name in ("ours", "theirs")}
    monkeypatch.setattr(servers, "ENGINES", recipes)
    monkeypatch.setattr("tokenspeed.bench.peers.compare.ENGINES", recipes)
    ours, theirs = peers.measure_peers(TALK, comparison("ours", "theirs"), tmp_path, settings={})
    assert starts == [("ours", 1), ("theirs", 1), ("ours", 2), ("theirs", 2)] * 2
    for report in (ours, theirs):
        assert [(run.users, run.repeat, run.answers, run.errors) for run in report.runs] == [
            (1, 0, 3, 0),
            (1, 1, 3, 0),
            (2, 0, 3, 0),
            (2, 1, 3, 0),
        ]
        assert report.incomplete is None
        assert all(run.server_cpu_s is not None for run in report.runs)
        (launch,) = report.launches
        assert "paced_server PORT" in launch and "PYTHONPATH=" in launch
    assert {entry.users for entry in live.compare(ours, theirs)} == {1, 2}
    assert json.loads((tmp_path / "ours" / "report.json").read_text())["plan"]["label"] == "ours"
    starts.clear()
    for path in (tmp_path / "theirs" / "runs").glob("users-2-*.json"):
        path.unlink()
    again = peers.measure_peers(TALK, comparison("ours", "theirs"), tmp_path, settings={})
    assert starts == [("theirs", 2)] * 2
    assert [report.launches for report in again] == [ours.launches, theirs.launches]


def test_an_engine_that_does_not_start_is_left_out_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[tuple[str, int]] = []

    def broken(wanted: servers._Wanted) -> peers.Launch:
        starts.append(("broken", wanted.users))
        return peers.Launch(command=(sys.executable, "-c", "raise SystemExit(3)"))

    recipes = {"ours": paced("ours", starts), "broken": broken}
    monkeypatch.setattr(servers, "ENGINES", recipes)
    monkeypatch.setattr("tokenspeed.bench.peers.compare.ENGINES", recipes)
    ours, theirs = peers.measure_peers(
        TALK, comparison("ours", "broken", repeats=1), tmp_path, settings={}
    )
    assert starts == [("ours", 1), ("broken", 1), ("ours", 2)]
    assert ours.incomplete is None and len(ours.runs) == 2
    assert theirs.incomplete is not None and "ended with 3" in theirs.incomplete
    assert "server.log" in theirs.incomplete


def test_an_interrupt_ends_the_whole_comparison_and_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[tuple[str, int]] = []
    recipes = {name: paced(name, starts) for name in ("ours", "theirs")}
    monkeypatch.setattr(servers, "ENGINES", recipes)
    monkeypatch.setattr("tokenspeed.bench.peers.compare.ENGINES", recipes)

    others = set(psutil.Process().children(recursive=True))
    # Whoever starts the tests in the background may have it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupt(live.Watcher):
        def answered(self, answer: live.AnswerRecord) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            peers.measure_peers(
                TALK, comparison("ours", "theirs"), tmp_path, settings={}, watcher=Interrupt()
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert starts == [("ours", 1)]
    assert (tmp_path / "ours" / "runs" / "users-1-repeat-0.json").exists()
    assert set(psutil.Process().children(recursive=True)) <= others


def test_a_server_gets_its_variables_and_is_gone_when_its_block_is_left(tmp_path: Path) -> None:
    port = peers.unused_port()
    program = (
        "import os, runpy, sys\n"
        "sys.argv[1:] = [os.environ['PACED_PORT']]\n"
        "runpy.run_module('tests.support.paced_server', run_name='__main__')"
    )
    launch = peers.Launch(
        command=(sys.executable, "-c", program), variables={"PACED_PORT": str(port)}
    )
    # As in a process that was started in the background.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with peers.Server(launch, port=port, log=tmp_path / "log") as server:
            assert live.find_server(server.url) == server.pid
    finally:
        signal.signal(signal.SIGINT, before)
    assert live.find_server(server.url) is None
    # It was told to end, not killed.
    assert server._process.returncode == -signal.SIGTERM


def test_only_engines_there_are_can_be_compared() -> None:
    with pytest.raises(ConfigError, match="openvino-int8"):
        comparison("magic")
    with pytest.raises(ConfigError, match="openvino-int8"):
        peers.launch_of("magic", "m", users=1, port=1, threads=1, context=1)


def test_our_server_gets_what_was_asked_for() -> None:
    launch = peers.launch_of(
        "tokenspeed", "smollm2-135m", users=4, port=8123, threads=2, context=4096
    )
    text = str(launch)
    for words in ("serve smollm2-135m", "--port 8123", "--threads 2", "--max-context 4096"):
        assert words in text


def test_a_peer_that_cannot_be_made_ready_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENSPEED_PEERS", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(MeasurementError, match="cannot be made ready"):
        peers.python("vllm")
