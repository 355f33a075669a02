"""An engine that hangs is told from one that is busy."""

import os
import subprocess
import sys

import pytest

from tokenspeed.engine.pulse import (
    REST_MAX_S,
    TICK_MAX_S,
    TICK_S,
    WORK_MAX_S,
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
