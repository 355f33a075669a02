"""Waiting: nobody waits for longer than the limit, and who is refused hears when to come back."""

import numpy as np
import pytest

from tests.unit.control.clocked import Machine
from tokenspeed.core.step import FinishReason, StepWork

SECOND_US = 1_000_000


def overload(machine: Machine, requests: int = 300) -> None:
    """Twice as many requests a second as can be served."""
    machine.warm()
    for request in range(requests):
        while machine.now_us < request * 40_000:
            if machine.step() is None:
                machine.now_us = request * 40_000
        machine.submit(request, 3000, 60)
    machine.run_until(*range(requests))


def test_nobody_waits_for_longer_than_the_limit() -> None:
    machine = Machine(slots_max=8, tps_floor=100.0, queue_timeout_us=2 * SECOND_US)
    overload(machine)
    refused = [r for r, reason in machine.finished.items() if reason is FinishReason.REFUSED]
    served = [r for r, reason in machine.finished.items() if reason is FinishReason.LENGTH]
    assert len(refused) > 50
    assert len(served) > 100
    assert max(machine.first[request] for request in served) < 2.5 * SECOND_US
    assert not set(refused) & set(machine.first), "who has had a token is never refused"
    assert machine.scheduler.stats().refusals == len(refused)


def test_a_limit_beyond_all_times_refuses_nobody() -> None:
    machine = Machine(slots_max=1, queue_timeout_us=2**63 - 1)
    machine.now_us = 1
    for request in range(3):
        machine.submit(request, 100, 3)
    machine.run_until(0, 1, 2)
    assert set(machine.finished.values()) == {FinishReason.LENGTH}


def test_without_a_limit_all_wait() -> None:
    machine = Machine(slots_max=8, tps_floor=100.0)
    overload(machine, 150)
    assert max(machine.first.values()) > 2.5 * SECOND_US
    assert set(machine.finished.values()) == {FinishReason.LENGTH}


def test_most_hear_at_once_and_all_hear_when_to_come_back() -> None:
    machine = Machine(slots_max=4, queue_timeout_us=5 * SECOND_US)
    machine.warm()
    for request in range(200):
        machine.submit(request, 8000, 100)
    machine.step()
    refused = [r for r, reason in machine.finished.items() if reason is FinishReason.REFUSED]
    assert len(refused) > 100, "the wait can be told when they come"
    waits_s = [machine.retries_ms[request] / 1000 for request in refused]
    assert all(1.0 <= wait_s < 60.0 for wait_s in waits_s)
    began_us = machine.now_us
    kept = set(range(200)) - set(refused)
    machine.run_until(*kept)
    assert max(machine.first[request] for request in kept & set(machine.first)) < 6 * SECOND_US
    assert machine.now_us - began_us > 2 * SECOND_US, "those who stayed were worth the wait"


class SlowMachine(Machine):
    """Takes a thousand times as long."""

    def time_us(self, work: StepWork) -> int:
        return 1000 * super().time_us(work)


def test_who_is_refused_comes_back_in_a_second_at_the_least_and_an_hour_at_the_most() -> None:
    quick = Machine(slots_max=1, queue_timeout_us=30_000)
    slow = SlowMachine(slots_max=1, queue_timeout_us=3 * 3600 * SECOND_US)
    for machine in (quick, slow):
        machine.warm()
        for request in range(100):
            machine.submit(request, 8000 if machine is slow else 20, 4)
        machine.run_until(*range(100))
    for machine, bound_ms in ((quick, 1000), (slow, 3_600_000)):
        waits_ms = [
            machine.retries_ms[request]
            for request, reason in machine.finished.items()
            if reason is FinishReason.REFUSED
        ]
        assert len(waits_ms) > 10
        assert bound_ms in waits_ms
        assert all(1000 <= wait_ms <= 3_600_000 for wait_ms in waits_ms)


def test_whoever_ends_otherwise_has_no_time_to_come_back() -> None:
    machine = Machine(queue_timeout_us=SECOND_US)
    machine.submit(0, 100, 3)
    machine.submit(1, 100, 300)
    machine.step()
    machine.scheduler.abort(1)
    machine.run_until(0, 1)
    assert machine.retries_ms == {0: 0, 1: 0}


def test_a_retracted_request_waits_for_as_long_as_it_takes() -> None:
    """It is sent away after a second, and still waits when its limit comes."""
    machine = Machine(pages=60, slots_max=4, queue_timeout_us=1_300_000)
    for request in range(3):
        machine.submit(request, 300, 600)
    machine.run_until(0, 1, 2)
    assert machine.scheduler.stats().retractions > 0
    assert set(machine.finished.values()) == {FinishReason.LENGTH}


def test_an_idle_engine_refuses_nobody() -> None:
    machine = Machine(tps_floor=100.0, queue_timeout_us=SECOND_US // 100)
    machine.warm()
    for request in range(20):
        machine.submit(request, 3000, 4)
        machine.run_until(request)
    assert set(machine.finished.values()) == {FinishReason.LENGTH}


@pytest.mark.parametrize("depth", [0, 1])
def test_refusal_leaves_nothing_behind(depth: int) -> None:
    machine = Machine(slots_max=2, queue_timeout_us=50_000, overlap_depth=depth)
    for request in range(50):
        machine.submit(request, 200, 30, tenant=request % 5)
    machine.run_until(*range(50))
    machine.scheduler.audit()
    stats = machine.scheduler.stats()
    assert (stats.running, stats.waiting, stats.pages_active) == (0, 0, 0)
    with pytest.raises(Exception, match="not live"):
        machine.scheduler.tokens(49)
    machine.scheduler.submit(
        49, np.ones(3, dtype=np.int32), max_new_tokens=1, stop_token_ids=np.zeros(0, dtype=np.int32)
    )
