"""The experiments say what the policy promises, and fail where nothing is promised."""

import pytest

from tests.unit.bench.traces import configured
from tokenspeed.bench import HARDWARE, floor, oversubscription
from tokenspeed.core.errors import ConfigError

FOUR = HARDWARE["h200x4-32b"].step_time


@pytest.mark.parametrize("jitter", [0.0, 0.05])
def test_the_floor_keeps_users_fast_while_a_long_prompt_comes(jitter: float) -> None:
    config = configured(
        pages=8192,
        step_time=FOUR,
        step_tokens_max=8192,
        context_max=131_072,
        jitter=jitter,
        overlap_depth=1,
    )
    found = floor(config, tps_floor=70.0)
    assert found.kept
    assert len(found.held.user_p99_ms) == 8
    assert found.broken_without
    # The prompt pays: it waits longer than it would alone, but not for ever.
    assert 1 < found.held.ttft_s / found.off.ttft_s < 3
    assert 0 < found.window_cost < 0.5


def test_a_floor_beyond_the_hardware_is_reported_as_not_kept() -> None:
    config = configured(
        pages=8192, step_time=FOUR, step_tokens_max=8192, context_max=131_072, overlap_depth=1
    )
    assert not floor(config, tps_floor=1000.0).kept


def test_a_pool_without_room_for_the_long_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="--kv-tokens"):
        floor(configured(pages=100, context_max=131_072), tps_floor=70.0)


def test_twice_the_pages_lose_no_request_and_little_throughput() -> None:
    config = configured(
        pages=2000, slots_max=64, step_time=HARDWARE["h200-32b"].step_time, step_tokens_max=2048
    )
    found = oversubscription(config, devices_per_replica=1)
    assert (
        found.crowded.config.scheduler.groups[0].pages * 2
        == found.roomy.config.scheduler.groups[0].pages
    )
    for summary in (found.crowded, found.half, found.roomy):
        assert summary.finished == summary.requests
    assert found.crowded.requests == 2 * found.half.requests
    assert found.crowded.retractions > found.half.retractions
    assert found.of_half > 0.9


def test_a_pool_that_tells_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--kv-tokens"):
        oversubscription(configured(pages=300), devices_per_replica=1)
