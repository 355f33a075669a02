"""`make bench` redraws the README without touching the rest of it."""

from pathlib import Path

import pytest
from benchmarks import standard

from tests.unit.bench.test_live_report import report, summary
from tokenspeed.bench import live
from tokenspeed.bench.offline import OfflineRow

README = Path(__file__).parents[3] / "README.md"


def test_only_what_is_between_the_marks_changes() -> None:
    text = README.read_text()
    once = standard.redraw(text, "| new |")
    assert once.count("| new |") == 1
    before, after = text.split(standard.BEGIN)[0], text.split(standard.END)[1]
    assert once.startswith(before) and once.endswith(after)
    assert standard.redraw(once, "| newer |") == standard.redraw(text, "| newer |")
    with pytest.raises(AssertionError, match="lacks the marks"):
        standard.redraw("no marks", "x")


def test_the_table_shows_every_run_and_every_piece_of_work() -> None:
    rows = (
        OfflineRow(work="prefill", tokens=512, users=1, tokens_per_s=live.estimate([1234.0])),
        OfflineRow(work="batch", tokens=512, users=8, tokens_per_s=live.estimate([99.0, 101.0])),
    )
    drawn = standard.table(report(summary(1, 0, tps=100), summary(2, 0, tps=80)), {"m": rows})
    for line in (
        "| 1 | 100.0 | 300 | 0.00 s | 0.00 s | 40% |",
        "| 2 | 80.0 | 300 | 0.00 s | 0.00 s | 40% |",
        "| m | prefill | 1 | 512 | 1,234 |",
        "| m | batch | 8 | 512 | 100 |",
    ):
        assert line in drawn.splitlines()
