"""The simulator against small worlds that can be worked out by hand."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.unit.bench.traces import DJANGO, configured, sessions, trace_of
from tokenspeed.bench import (
    Results,
    SimulationConfig,
    StepTime,
    Trace,
    TraceRequest,
    find_baselines,
    read_trace,
    simulate,
    simulate_file,
    summarise,
)
from tokenspeed.bench.results import IntervalCounts
from tokenspeed.core.errors import ConfigError
from tokenspeed.core.step import FinishReason

TWO_TURNS = trace_of(
    TraceRequest(sent_us=0, input_tokens=1024, output_tokens=3, blocks=(1, 2), session="a", turn=0),
    TraceRequest(
        sent_us=20_000, input_tokens=1100, output_tokens=2, blocks=(1, 2), session="a", turn=1
    ),
)


def column(results: Results, name: str) -> list[int]:
    values: list[int] = getattr(results, name).tolist()
    return values


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_times_and_hits_of_two_turns_are_those_worked_out_by_hand(overlap_depth: int) -> None:
    results = simulate(TWO_TURNS, configured(overlap_depth=overlap_depth))
    # First turn: 1000 + 1024 * 10, then two decode steps of 1100. The second finds 32 pages, 1024
    # tokens, and computes 76: 1000 + 760, then one decode step.
    assert column(results, "first_us") == [11_240, 21_760]
    assert column(results, "ended_us") == [13_440, 22_860]
    assert column(results, "cached") == [0, 1024]
    assert column(results, "emitted") == [3, 2]
    assert (results.interval_us.tolist(), results.interval_counts.tolist()) == ([1100], [3])
    assert column(results, "busy_us") == [13_440 + 2_860]


def test_the_report_says_what_the_columns_say() -> None:
    config = configured(floor_tps=1000.0)
    results = simulate(TWO_TURNS, config)
    beside = find_baselines(TWO_TURNS, results, pages=4096, page_size=32)
    summary = summarise(results, config, trace_name="tiny", devices_per_replica=2, baselines=beside)
    assert (summary.requests, summary.finished, summary.refused) == (2, 2, 0)
    assert summary.hit_rate == summary.lru_hit_rate == summary.optimum_hit_rate == 1024 / 2124
    assert summary.duration_s == pytest.approx(0.02286)
    assert summary.output_tpm == pytest.approx(5 / 0.02286 * 60)
    assert summary.output_tpm_device == pytest.approx(summary.output_tpm / 2)
    assert summary.tps.p50 == pytest.approx(1e6 / 1100)
    assert [(entry.turns, entry.requests) for entry in summary.ttft] == [("0", 1), ("1-4", 1)]
    assert summary.ttft[1].ttft_s.p50 == pytest.approx(0.00176)
    assert summary.floor is not None
    assert (summary.floor.users_below, summary.floor.intervals_above) == (2, 3)
    assert summary.interval_ms.p99 == 1.1


def test_every_term_of_the_step_time_counts() -> None:
    one = trace_of(TraceRequest(sent_us=0, input_tokens=100, output_tokens=2, blocks=()))

    def times(step_time: StepTime) -> tuple[int, int]:
        results = simulate(one, configured(step_time=step_time))
        return int(results.first_us[0]), int(results.last_us[0] - results.first_us[0])

    # One step of 100 prompt tokens, which visit 100 * 100 / 2 pairs; one of one decode row, which
    # reads 100 tokens of KV.
    assert times(StepTime(step_us=7)) == (7, 7)
    assert times(StepTime(step_us=1, prefill_token_us=3)) == (301, 1)
    assert times(StepTime(step_us=1, decode_row_us=5)) == (1, 6)
    assert times(StepTime(step_us=1, kv_token_us=2)) == (1, 201)
    assert times(StepTime(step_us=1, pair_us=1)) == (5001, 1)
    assert times(StepTime(weights_us=250, prefill_token_us=3, decode_row_us=5)) == (300, 250)


def test_a_chunked_prompt_visits_the_same_pairs_as_a_whole_one() -> None:
    one = trace_of(TraceRequest(sent_us=0, input_tokens=1000, output_tokens=1, blocks=(1,)))
    step_time = StepTime(pair_us=1)
    whole = simulate(one, configured(step_time=step_time))
    chunked = simulate(one, configured(step_time=step_time, step_tokens_max=16))
    assert whole.first_us == chunked.first_us == [1000 * 1000 // 2]


def test_a_closed_loop_sends_a_turn_after_the_answer_and_the_tool() -> None:
    closed = configured(loop="closed", tool_gap_ms=5.0)
    assert column(simulate(TWO_TURNS, closed), "arrived_us") == [0, 13_440 + 5_000]
    # 20 ms between the turns, of which the recorded provider took 3 * 4 ms.
    recorded = configured(loop="closed", recorded_token_ms=4.0)
    assert column(simulate(TWO_TURNS, recorded), "arrived_us") == [0, 13_440 + 8_000]
    swift = configured(loop="closed", tool_gap_ms=0.0)
    assert column(simulate(TWO_TURNS, swift), "arrived_us") == [0, 13_440]


def test_a_closed_loop_needs_sessions() -> None:
    nameless = trace_of(TraceRequest(sent_us=0, input_tokens=9, output_tokens=1, blocks=()))
    with pytest.raises(ConfigError, match="--loop open"):
        simulate(nameless, configured(loop="closed"))


def test_speed_brings_requests_closer() -> None:
    results = simulate(TWO_TURNS, configured(speed=2.0))
    assert column(results, "arrived_us") == [0, 10_000]


@pytest.mark.parametrize("loop", ["open", "closed"])
@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_every_request_ends_once_with_all_its_tokens(loop: str, overlap_depth: int) -> None:
    # Few pages: requests are retracted, and pages evicted, on the way.
    trace = sessions(12, 4)
    config = configured(
        loop=loop,
        pages=220,
        slots_max=8,
        step_tokens_max=512,
        overlap_depth=overlap_depth,
        replicas=3,
        group_replicas=2,
        scale=2,
    )
    results = simulate(trace, config)
    pairs = set(zip(column(results, "copy"), column(results, "trace_index"), strict=True))
    assert len(pairs) == len(results.copy) == 2 * len(trace.requests)
    assert (results.reasons == FinishReason.LENGTH).all()
    assert (results.emitted == results.output_tokens).all()
    assert (results.arrived_us < results.first_us).all()
    assert (results.first_us < results.last_us).all()
    assert (results.ended_us == results.last_us).all()
    assert results.interval_counts.sum() == (results.emitted - 1).sum()
    assert results.timeline.sum() == results.emitted.sum()
    assert (results.cached < results.input_tokens).all()
    assert results.evictions.sum() > 0


def test_what_can_never_fit_is_counted_and_the_rest_goes_on() -> None:
    # One is longer than the pool, one longer than the context.
    long = TraceRequest(sent_us=5, input_tokens=5000, output_tokens=1, blocks=tuple(range(9)))
    longer = dataclasses.replace(long, input_tokens=70_000, blocks=tuple(range(136)))
    trace = trace_of(*TWO_TURNS.requests, long, longer)
    config = configured(pages=64)
    results = simulate(trace, config)
    assert column(results, "reasons") == [2, 4, 4, 2]
    summary = summarise(results, config, trace_name="tiny", devices_per_replica=1, baselines=None)
    assert (summary.finished, summary.rejected, summary.refused) == (2, 2, 0)
    assert summary.prompt_tokens == 2124


def test_who_waits_too_long_is_refused_and_counted() -> None:
    trace = sessions(30, 1, apart_us=0, output_tokens=100)
    config = configured(slots_max=2, queue_timeout_us=100_000)
    results = simulate(trace, config)
    summary = summarise(results, config, trace_name="tiny", devices_per_replica=1, baselines=None)
    assert summary.refused > 0
    assert summary.finished > 0
    assert summary.finished + summary.refused == 30
    refused = results.reasons == FinishReason.REFUSED
    assert (results.emitted[refused] == 0).all()
    assert ((results.ended_us - results.arrived_us)[refused] < 200_000).all()


def same(one: Results, other: Results) -> bool:
    return one.to_bytes() == other.to_bytes()


def test_equal_seeds_give_equal_results_and_others_do_not() -> None:
    trace = sessions(6, 3)
    config = configured(scale=3, replicas=2, jitter=0.1, seed=5)
    assert same(simulate(trace, config), simulate(trace, config))
    assert not same(simulate(trace, config), simulate(trace, dataclasses.replace(config, seed=6)))


def test_worker_processes_give_the_same_results(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "\n".join(
            f'{{"timestamp": {index * 30}, "input_length": 700, "output_length": 20, '
            f'"hash_ids": [{index % 7}], "session": "s{index % 7}", "turn": {index // 7}}}'
            for index in range(28)
        )
    )
    config = configured(scale=4, replicas=5, group_replicas=2, jitter=0.1)
    assert same(simulate_file(path, config), simulate_file(path, config, jobs=2))


def test_a_request_that_ended_loads_its_replica_no_more() -> None:
    # One after the other: none is ever beside another, so the session never has to move.
    results = simulate(sessions(1, 12), configured(replicas=2))
    assert set(column(results, "replica")) == {0}


def test_copies_come_at_other_times_and_their_sessions_as_wholes() -> None:
    trace = sessions(3, 4)
    results = simulate(trace, configured(scale=3))
    arrived = {
        (copy, entry): at
        for copy, entry, at in zip(
            column(results, "copy"),
            column(results, "trace_index"),
            column(results, "arrived_us"),
            strict=True,
        )
    }
    first = {
        (copy, trace.requests[entry].session): at
        for (copy, entry), at in arrived.items()
        if trace.requests[entry].turn == 0
    }
    assert len(set(first.values())) == 9
    span_us = trace.requests[-1].sent_us + 1
    assert max(first.values()) < span_us
    for (copy, entry), at in arrived.items():
        request = trace.requests[entry]
        assert at - first[copy, request.session] == 400_000 * request.turn


def test_copies_share_no_page() -> None:
    trace = sessions(3, 1)
    results = simulate(trace, configured(scale=2))
    assert not results.cached.any()
    beside = find_baselines(trace, results, pages=4096, page_size=32)
    assert (beside.lru_tokens, beside.optimum_tokens) == (0, 0)


def test_jitter_moves_times_but_not_what_is_done() -> None:
    trace = sessions(4, 3)
    calm, shaken = (simulate(trace, configured(jitter=jitter)) for jitter in (0.0, 0.2))
    assert column(calm, "emitted") == column(shaken, "emitted")
    assert len(shaken.interval_us) > len(calm.interval_us)


def test_baselines_bound_the_scheduler_on_a_small_pool() -> None:
    trace = sessions(10, 4, apart_us=900_000, between_us=1_500_000)
    config = configured(pages=190)
    results = simulate(trace, config)
    beside = find_baselines(trace, results, pages=190, page_size=32)
    cached = int(results.cached.sum())
    assert 0 < beside.lru_tokens < beside.optimum_tokens
    assert cached <= beside.optimum_tokens


def test_intervals_are_counted_exactly_however_they_come() -> None:
    rng = np.random.Generator(np.random.Philox(3))
    counts = IntervalCounts()
    seen = [rng.integers(0, 50, 100_000) for _ in range(7)]
    for intervals in seen:
        counts.add(intervals)
    values, numbers = counts.total()
    assert (numbers == np.bincount(np.concatenate(seen))).all()
    assert values.tolist() == list(range(50))


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"replicas": 0}, "--replicas"),
        ({"scale": 10**9}, "--scale"),
        ({"speed": 0.0}, "--speed"),
        ({"speed": float("nan")}, "--speed"),
        ({"load_bound": 0.5}, "--load-bound"),
        ({"jitter": -0.1}, "--jitter"),
        ({"tool_gap_ms": -1.0}, "--tool-gap-ms"),
        ({"floor_tps": float("inf")}, "--tps-floor"),
        ({"router": "magic"}, "round-robin"),
        ({"loop": "spiral"}, "closed"),
    ],
    ids=str,
)
def test_a_wrong_setting_names_its_flag(change: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        configured(**change)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e12])
def test_a_step_time_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="kv_token_us"):
        StepTime(kv_token_us=value)


def django(limit: int) -> Trace:
    if not DJANGO.is_file():
        pytest.skip(f"{DJANGO} is not here")
    return read_trace(DJANGO, limit=limit)


def test_a_recorded_session_finds_its_history_in_the_cache() -> None:
    trace = django(300)
    config: SimulationConfig = configured(pages=20_000, context_max=131_072)
    results = simulate(trace, config)
    beside = find_baselines(trace, results, pages=20_000, page_size=32)
    cached = int(results.cached.sum())
    assert cached / int(results.input_tokens.sum()) > 0.95
    assert beside.optimum_tokens == cached
