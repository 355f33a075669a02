"""Runs become numbers as docs/bench.md defines them, and reports say what they rest on."""

import dataclasses
import math
from pathlib import Path

import msgspec
import pytest

from tests.unit.bench.live_support import session, workload
from tokenspeed.bench import live
from tokenspeed.core.errors import ConfigError, WorkloadError

ANSWER = live.AnswerRecord(
    session="a",
    turn=0,
    sent_us=0,
    piece_us=(100_000, 200_000, 300_000),
    ended_us=300_000,
    asked_tokens=5,
    output_tokens=5,
    prompt_tokens=50,
    cached_tokens=20,
)
RUN = live.Run(
    users=1,
    repeat=0,
    salt="s",
    began_at=0.0,
    window_us=60_000_000,
    full_load_us=45_000_000,
    client_cpu_s=0.5,
    server=live.ProcessUsage(pids=(7,), cpu_s=3.0, rss_max_bytes=1000),
    calibration=None,
    stopped=None,
    answers=(ANSWER,),
)
PLAN = live.SweepPlan(
    label="ours",
    url="http://127.0.0.1:1",
    model="m",
    workload="w",
    workload_digest="d",
    sessions=1,
    turns=1,
    concurrency=(1, 2),
    repeats=2,
    settings={"floor": "70 TPS"},
)


def run_of(*answers: live.AnswerRecord, **changes: object) -> live.Run:
    return dataclasses.replace(RUN, answers=answers, **changes)  # type: ignore[arg-type]


def test_tps_is_over_the_time_from_first_to_last_token_and_leaves_ttft_out() -> None:
    summary = live.summarise_run(RUN)
    assert summary.tps is not None and summary.ttft_s is not None
    assert summary.tps.p50 == pytest.approx(4 / 0.2)
    assert summary.ttft_s.p50 == pytest.approx(0.1)
    assert summary.tokens_per_piece == pytest.approx(5 / 3)
    assert summary.server_cpu_s_per_1k_tokens == pytest.approx(600)
    assert summary.full_load_part == 0.75


def test_cached_prompt_tokens_do_not_count_as_output() -> None:
    summary = live.summarise_run(RUN)
    assert summary.output_tpm == 5
    assert (summary.prompt_tpm, summary.computed_prompt_tpm) == (50, 30)


def test_an_answer_of_one_token_has_no_speed() -> None:
    one = dataclasses.replace(ANSWER, piece_us=(100_000,), output_tokens=1, asked_tokens=1)
    at_once = dataclasses.replace(ANSWER, piece_us=(100_000, 100_000), output_tokens=2)
    summary = live.summarise_run(run_of(one, at_once), floor_tps=1e6)
    assert summary.tps is None
    assert summary.goodput is not None and summary.goodput.answers_part == 1.0


def test_tokens_after_the_window_do_not_count_in_rates() -> None:
    late = dataclasses.replace(ANSWER, sent_us=59_850_000, output_tokens=6, asked_tokens=6)
    summary = live.summarise_run(run_of(late), floor_tps=1.0)
    # One piece of three came within the window.
    assert summary.output_tpm == pytest.approx(2)
    assert summary.goodput is not None and summary.goodput.output_tpm == pytest.approx(2)
    assert summary.output_tokens == 6


def test_goodput_counts_answers_that_were_fast_and_soon_enough() -> None:
    slow = dataclasses.replace(ANSWER, piece_us=(100_000, 200_000, 600_000), output_tokens=6)
    failed = dataclasses.replace(ANSWER, error="HTTP 500")
    run = run_of(ANSWER, slow, failed)
    for floor_tps, ttft_max_s, good, tokens in (
        (20, None, 1, 5),
        (10, None, 2, 11),
        (8, 0.09, 0, 0),
        (21, None, 0, 0),
    ):
        goodput = live.summarise_run(run, floor_tps=floor_tps, ttft_max_s=ttft_max_s).goodput
        assert goodput is not None
        assert goodput.answers_part == pytest.approx(good / 3)
        assert goodput.output_tpm == pytest.approx(tokens)
    assert live.summarise_run(run).goodput is None


def test_the_interval_of_a_mean_is_students() -> None:
    found = live.estimate([10.0, 12.0, 14.0])
    assert found.mean == 12
    # t(0.975, 2) = 4.303; the standard error is 2 / sqrt 3.
    assert found.high == pytest.approx(12 + 4.303 * 2 / math.sqrt(3))
    assert found.low == pytest.approx(12 - 4.303 * 2 / math.sqrt(3))
    single = live.estimate([10.0])
    assert (single.mean, single.low, single.high) == (10, None, None)
    ratio = live.estimate_ratio([0.5, 2.0])
    assert ratio.mean == pytest.approx(1.0)
    assert ratio.low is not None and ratio.high == pytest.approx(1 / ratio.low)


def summary(
    users: int, repeat: int, *, tps: float, seconds: float = 1.0, stopped: str | None = None
) -> live.Summary:
    answer = dataclasses.replace(
        ANSWER, piece_us=(0, round(4e6 / tps)), output_tokens=5, asked_tokens=5
    )
    run = run_of(
        answer, users=users, repeat=repeat, window_us=round(seconds * 1e6), stopped=stopped
    )
    return live.summarise_run(run)


def report(*runs: live.Summary, **plan: object) -> live.ReplayReport:
    return live.report_of(
        dataclasses.replace(PLAN, **plan),  # type: ignore[arg-type]
        runs,
        version="v",
        machine="here",
        began_at=0.0,
        forced_lengths=True,
        incomplete=None,
    )


def test_a_level_is_on_the_frontier_if_none_is_better_in_both() -> None:
    found = report(
        summary(1, 0, tps=100, seconds=10),
        summary(2, 0, tps=80, seconds=5),
        summary(4, 0, tps=70, seconds=6),
        summary(8, 0, tps=30, seconds=2),
    )
    marks = {level.users: level.on_frontier for level in found.levels}
    assert marks == {1: True, 2: True, 4: False, 8: True}


def test_a_stopped_run_is_shown_and_not_counted_in() -> None:
    found = report(
        summary(1, 0, tps=100), summary(1, 1, tps=50), summary(1, 2, tps=1, stopped="gone")
    )
    (level,) = found.levels
    assert level.figures["tps_p50"].values == pytest.approx((100, 50), rel=1e-4)
    assert len(found.runs) == 3


def test_a_report_is_read_back_as_it_was(tmp_path: Path) -> None:
    found = report(summary(1, 0, tps=100), summary(2, 0, tps=80))
    path = tmp_path / "report.json"
    path.write_bytes(found.to_json())
    assert live.read_report(path) == found
    path.write_text('{"version": 1}')
    with pytest.raises(WorkloadError, match="no report"):
        live.read_report(path)
    with pytest.raises(WorkloadError, match="No such file"):
        live.read_report(tmp_path / "none")


def test_a_comparison_is_of_pairs_and_not_of_averages() -> None:
    before = report(*(summary(1, n, tps=tps) for n, tps in enumerate((100, 50, 25))))
    after = report(*(summary(1, n, tps=tps) for n, tps in enumerate((121, 60, 30))))
    found = {entry.figure: entry for entry in live.compare(before, after)}
    tps = found["tps_p50"]
    assert tps.ratio.values == pytest.approx((1.21, 1.2, 1.2), rel=1e-3)
    assert tps.ratio.mean == pytest.approx(1.2033, rel=1e-3)
    assert tps.is_better is True
    assert found["output_tpm"].is_better is None
    backwards = {entry.figure: entry for entry in live.compare(after, before)}
    assert backwards["tps_p50"].is_better is False
    assert backwards["interval_p50_ms"].is_better is False
    assert found["interval_p50_ms"].is_better is True


def test_reports_of_different_work_are_not_compared() -> None:
    ours = report(summary(1, 0, tps=100))
    with pytest.raises(WorkloadError, match="workload_digest"):
        live.compare(ours, report(summary(1, 0, tps=100), workload_digest="e"))
    with pytest.raises(WorkloadError, match="settings"):
        live.compare(ours, report(summary(1, 0, tps=100), settings={}))
    with pytest.raises(WorkloadError, match="users and repeat"):
        live.compare(ours, report(summary(2, 0, tps=100)))


def test_the_digest_tells_work_apart() -> None:
    work = workload(session("a", ("x", 3)))
    assert live.digest(work) == live.digest(workload(session("a", ("x", 3))))
    others = [session("a", ("x", 4)), session("a", ("y", 3)), session("a", ("x", 3), start_s=1.0)]
    assert len({live.digest(workload(other)) for other in others} | {live.digest(work)}) == 4


def test_a_page_needs_no_other_file(tmp_path: Path) -> None:
    name = "<ours> & theirs"
    found = report(summary(1, 0, tps=100), summary(2, 0, tps=80), label=name)
    paths = live.write_page([found, found], tmp_path, title=name)
    assert [path.name for path in paths] == ["frontier.png", "report.html"]
    assert paths[0].read_bytes()[:4] == b"\x89PNG"
    page = paths[1].read_text()
    assert 'src="data:image/png;base64,' in page and "http://" not in page.replace(PLAN.url, "")
    assert "&lt;ours&gt; &amp; theirs" in page and "<ours>" not in page
    data = page.split('<script type="application/json">')[1].split("</script>")[0]
    assert msgspec.json.decode(data, type=live.ReplayReport) == found


def test_a_store_keeps_runs_of_its_plan_only(tmp_path: Path) -> None:
    store = live.RunStore(tmp_path / "out", PLAN)
    assert store.load(1, 0) is None
    store.save(RUN)
    store.save(dataclasses.replace(RUN, repeat=1, stopped="gone"))
    moved = dataclasses.replace(PLAN, url="http://127.0.0.1:2")
    again = live.RunStore(tmp_path / "out", moved)
    assert again.load(1, 0) == RUN
    assert again.load(1, 1) is None and again.load(2, 0) is None
    with pytest.raises(ConfigError, match=r"repeats 2, but 3 is asked for"):
        live.RunStore(tmp_path / "out", dataclasses.replace(PLAN, repeats=3))
    (tmp_path / "out" / "runs" / "users-1-repeat-0.json").write_text("{")
    with pytest.raises(WorkloadError, match="users-1-repeat-0"):
        again.load(1, 0)
    (tmp_path / "out" / "plan.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"plan\.json"):
        live.RunStore(tmp_path / "out", PLAN)
