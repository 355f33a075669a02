"""An engine that hangs is told from one that is busy."""

import asyncio
import os
import subprocess
import sys

import pytest

from tokenspeed.core.errors import EngineDead
from tokenspeed.engine import pulse
from tokenspeed.engine.pulse import (
    REST_MAX_S,
    TICK_MAX_S,
    TICK_S,
    WORK_MAX_S,
    Pulse,
    Silence,
    cpu_time_s,
    descendants,
)


def silent_for(worked_share: float | None) -> tuple[float, str]:
    """How long an engine may say nothing that works for a share of the time; and what is said."""
    silence = Silence()
    seconds = 0.0
    while True:
        seconds += TICK_S
        worked_s = None if worked_share is None else worked_share * TICK_S
        if (reason := silence.lasts(TICK_S, worked_s)) is not None:
            return seconds, reason


def test_one_at_rest_is_given_up_within_ten_seconds() -> None:
    seconds, reason = silent_for(0.0)
    assert REST_MAX_S <= seconds <= 10.0 - 2 * TICK_S
    assert "does nothing" in reason


@pytest.mark.parametrize("share", [0.1, 2.0, None])
def test_one_at_work_gets_longer(share: float | None) -> None:
    seconds, reason = silent_for(share)
    assert seconds >= WORK_MAX_S
    assert "endless" in reason


def test_a_word_begins_the_count_anew() -> None:
    silence = Silence()
    for _ in range(100):
        assert silence.lasts(TICK_S, 0.0) is None
        silence.broken()


def test_a_watcher_that_was_held_itself_has_seen_no_silence() -> None:
    silence = Silence()
    assert silence.lasts(3600.0, 0.0) is None
    assert TICK_MAX_S < REST_MAX_S


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_processes_below_a_process_are_found() -> None:
    script = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        while len(found := descendants(os.getpid())) < 2:
            pass
        assert child.pid in found
        assert cpu_time_s(child.pid) is not None
    finally:
        for pid in descendants(child.pid):
            os.kill(pid, 9)
        child.kill()
        child.wait()
    assert cpu_time_s(2**22 + 1) is None


class Client:
    """Of an engine that answers so many questions, and then ends, or says nothing any more."""

    def __init__(self, answers: int, *, ends: bool) -> None:
        self.alive = True
        self.messages = 0
        self.asked = 0
        self._answers = answers
        self._ends = ends

    async def stats(self) -> None:
        self.asked += 1
        if self.asked > self._answers:
            if not self._ends:
                await asyncio.Event().wait()
            self.alive = False
        self.messages += 1


def lost(client: Client) -> str:
    """Why the engine is given up, which is soon or never."""
    return asyncio.run(asyncio.wait_for(Pulse(client, 1).lost(), 60))  # type: ignore[arg-type]


@pytest.fixture
def at_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times as fast, in an engine whose CPU time stands still."""
    for name in ("TICK_S", "TICK_MAX_S", "REST_MAX_S", "WORK_MAX_S"):
        monkeypatch.setattr(pulse, name, getattr(pulse, name) / 100)
    monkeypatch.setattr(pulse, "cpu_time_s", lambda pid: 0.0)
    monkeypatch.setattr(pulse, "wants_to_run", lambda pid: False)


@pytest.mark.usefixtures("at_speed")
def test_an_engine_that_answers_no_more_is_lost() -> None:
    client = Client(3, ends=False)
    assert "does nothing" in lost(client)
    # One question is enough, however long it stays open.
    assert client.asked == 4


@pytest.mark.usefixtures("at_speed")
def test_an_engine_that_answers_is_not_lost_and_its_end_is_told() -> None:
    client = Client(40, ends=True)
    with pytest.raises(EngineDead):
        lost(client)
    assert client.asked == 41


@pytest.mark.usefixtures("at_speed")
def test_an_engine_that_waits_for_a_cpu_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "wants_to_run", lambda pid: True)
    assert "endless" in lost(Client(0, ends=False))
