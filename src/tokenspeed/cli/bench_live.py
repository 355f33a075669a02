"""Replays on the terminal: live figures while a server is measured, tables afterwards."""

import logging
import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tokenspeed.bench import live

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LiveFigures", "comparison_table", "replay_table"]

_log = logging.getLogger(__name__)

# Live figures are of the last so many answers.
_RECENT = 20


class LiveFigures(live.Watcher):
    """Bars and figures on a terminal; elsewhere a line of log for each run."""

    def __init__(self, *, runs: int, turns: int) -> None:
        """`turns` of one run, to tell how far it is."""
        self._runs, self._turns = runs, turns
        self._done = 0
        self._recent: deque[live.AnswerRecord] = deque(maxlen=_RECENT)
        self._answers = self._errors = self._tokens = 0
        self._began_s = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._bar.add_task("warming up", total=None)
        self._live: Live | None = None
        if sys.stderr.isatty():
            self._live = Live(
                get_renderable=self._render,
                console=Console(stderr=True),
                refresh_per_second=4,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begins(self, asked: live.Pass) -> None:
        """A new bar for a new run."""
        users = "open loop" if asked.users is None else f"{asked.users} users"
        name = f"run {self._done + 1} of {self._runs}: {users}"
        total = self._turns if asked.duration_s is None else None
        self._bar.reset(self._task, description=name, total=total)
        self._recent.clear()
        self._answers = self._errors = self._tokens = 0
        self._began_s = time.monotonic()

    def answered(self, answer: live.AnswerRecord) -> None:
        """Count it in."""
        self._answers += 1
        self._errors += answer.error is not None
        if answer.error is None:
            self._tokens += answer.tokens
            self._recent.append(answer)
        self._bar.advance(self._task)

    def ended(self, run: live.Run) -> None:
        """One line a run."""
        self._done += 1
        users = "open loop" if run.users is None else f"{run.users} users"
        line = f"{users}, repeat {run.repeat}: {', '.join(_parts(live.summarise_run(run)))}"
        if self._live is None:
            _log.info("%s", line)
        else:
            # Above the bars, which a line of log would tear.
            self._live.console.print(line, highlight=False)

    def _render(self) -> Group:
        passed_min = max(time.monotonic() - self._began_s, 1e-3) / 60
        text = f"{self._tokens / passed_min:,.0f} output tokens a minute"
        waits = sorted(answer.piece_us[0] for answer in self._recent if answer.piece_us)
        if waits:
            text += f"; last {len(waits)} answers: TTFT {waits[len(waits) // 2] / 1e6:.2f} s"
        rates = sorted(
            (answer.tokens - 1) * 1e6 / (answer.piece_us[-1] - answer.piece_us[0])
            for answer in self._recent
            if len(answer.piece_us) > 1 and answer.piece_us[-1] > answer.piece_us[0]
        )
        if rates:
            text += f", TPS {rates[len(rates) // 2]:.1f}"
        if self._errors:
            text += f"; {self._errors} errors"
        return Group(self._bar, Text(text))


def _parts(found: live.Summary) -> list[str]:
    parts = [f"{found.answers} answers"]
    parts += [f"{found.errors} errors"] if found.errors else []
    parts += [f"{found.output_tpm:,.0f} TPM"] if found.output_tokens else []
    parts += [f"TPS {found.tps.p50:.1f}"] if found.tps is not None else []
    parts += [f"TTFT {found.ttft_s.p50:.2f} s"] if found.ttft_s is not None else []
    return parts


def replay_table(report: live.ReplayReport) -> Table:
    """A sweep: a column for each number of users."""
    table = Table(box=None, pad_edge=False, title=report.plan.label, title_justify="left")
    table.add_column("users", no_wrap=True)
    for level in report.levels:
        name = "open loop" if level.users is None else str(level.users)
        table.add_column(name + (" *" if level.on_frontier else ""), justify="right", no_wrap=True)
    for key, figure in live.FIGURES.items():
        cells = [_estimate(level.figures.get(key)) for level in report.levels]
        if any(cells):
            table.add_row(figure.name, *cells)
    of = [[run for run in report.runs if run.users == level.users] for level in report.levels]
    rows = {
        "cached, by usage": [_part([run.cached_part_by_usage for run in runs]) for runs in of],
        "cached, by TTFT, at least": [
            _part([run.cached_part_by_ttft for run in runs]) for runs in of
        ],
        "errors of answers": [
            f"{sum(run.errors for run in runs)} of {sum(run.answers for run in runs)}"
            for runs in of
        ],
    }
    for name, cells in rows.items():
        if any(cells):
            table.add_row(name, *cells)
    table.caption = _caption(report)
    table.caption_justify = "left"
    return table


def _caption(report: live.ReplayReport) -> str:
    notes = ["* on the frontier"]
    wrong = sum(run.wrong_lengths for run in report.runs)
    if wrong:
        notes.append(f"{wrong} answers have not the length that was asked for")
    uncounted = sum(run.uncounted for run in report.runs)
    if uncounted:
        notes.append(f"the server did not count the tokens of {uncounted} answers")
    if not report.forced_lengths:
        notes.append("the server does not take ignore_eos and min_tokens")
    return "; ".join(notes)


def comparison_table(found: "Sequence[live.Comparison]", first: str, second: str) -> Table:
    """Ratios of pairs, second over first."""
    table = Table(box=None, pad_edge=False)
    for name in ("users", "figure", first, second, "ratio", "95%", ""):
        table.add_column(name, justify="left" if name == "figure" else "right", no_wrap=True)
    for entry in found:
        low, high = entry.ratio.low, entry.ratio.high
        verdict = {True: "better", False: "worse", None: ""}[entry.is_better]
        table.add_row(
            "open" if entry.users is None else str(entry.users),
            live.FIGURES[entry.figure].name,
            f"{entry.first:,.4g}",
            f"{entry.second:,.4g}",
            f"{entry.ratio.mean:.3f}",
            "" if low is None or high is None else f"{low:.3f} to {high:.3f}",
            verdict,
        )
    return table


def _estimate(entry: live.Estimate | None) -> str:
    if entry is None:
        return ""
    half = "" if entry.high is None else f" ±{entry.high - entry.mean:.2g}"
    return f"{entry.mean:,.4g}{half}"


def _part(values: "Sequence[float | None]") -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.1%}" if known else ""
