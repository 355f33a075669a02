"""A sweep over numbers of users as one report: runs, figures over repeats, frontier; as JSON."""

import contextlib
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tokenspeed.bench.live.metrics import Summary
from tokenspeed.bench.live.statistics import Estimate, estimate
from tokenspeed.core.errors import WorkloadError

__all__ = [
    "FIGURES",
    "Figure",
    "Level",
    "ReplayReport",
    "SweepPlan",
    "machine",
    "read_report",
    "report_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of a run, for tables and comparisons.

    Attributes:
        name: as it is printed, with its unit.
        value: from a summary; None where it was not measured.
        more_is_better: which way is better.
    """

    name: str
    value: Callable[[Summary], float | None]
    more_is_better: bool


FIGURES = {
    "tps_p50": Figure(
        name="TPS of a user, p50",
        value=lambda s: None if s.tps is None else s.tps.p50,
        more_is_better=True,
    ),
    "tps_p10": Figure(
        name="TPS of a user, p10",
        value=lambda s: None if s.tps is None else s.tps.p10,
        more_is_better=True,
    ),
    "output_tpm": Figure(name="output TPM", value=lambda s: s.output_tpm, more_is_better=True),
    "goodput_tpm": Figure(
        name="goodput TPM",
        value=lambda s: None if s.goodput is None else s.goodput.output_tpm,
        more_is_better=True,
    ),
    "ttft_p50_s": Figure(
        name="TTFT p50, s",
        value=lambda s: None if s.ttft_s is None else s.ttft_s.p50,
        more_is_better=False,
    ),
    "ttft_p99_s": Figure(
        name="TTFT p99, s",
        value=lambda s: None if s.ttft_s is None else s.ttft_s.p99,
        more_is_better=False,
    ),
    "interval_p50_ms": Figure(
        name="interval p50, ms",
        value=lambda s: None if s.interval_ms is None else s.interval_ms.p50,
        more_is_better=False,
    ),
    "interval_p99_ms": Figure(
        name="interval p99, ms",
        value=lambda s: None if s.interval_ms is None else s.interval_ms.p99,
        more_is_better=False,
    ),
    "server_cpu_s_per_1k_tokens": Figure(
        name="server CPU-s per 1K tokens",
        value=lambda s: s.server_cpu_s_per_1k_tokens,
        more_is_better=False,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """All that a sweep's figures depend on beside the server; equal plans can be compared.

    Attributes:
        label: what the report calls the server.
        url, model: of it.
        workload: where the sessions are from; `sessions` and `turns` say how many.
        workload_digest: of everything that is sent.
        concurrency: numbers of users; empty for an open loop.
        repeats: runs with each.
        settings: of the replay, by flag.
    """

    label: str
    url: str
    model: str
    workload: str
    workload_digest: str
    sessions: int
    turns: int
    concurrency: tuple[int, ...]
    repeats: int
    settings: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One number of users: figures over its repeats. `on_frontier` if no other level has both more
    TPS a user and more TPM."""

    users: int | None
    figures: dict[str, Estimate]
    on_frontier: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """A whole sweep.

    Attributes:
        version: of TokenSpeed's client.
        machine: where the client ran.
        began_at: seconds since 1970.
        plan: what was asked for.
        forced_lengths: whether the server took what forces an answer's length.
        incomplete: why runs are missing; None if none are.
        levels: in order of users.
        runs: by users, then repeat.
        launches: how the server was started, where we started it.
    """

    version: str
    machine: str
    began_at: float
    plan: SweepPlan
    forced_lengths: bool
    incomplete: str | None
    levels: tuple[Level, ...]
    runs: tuple[Summary, ...]
    launches: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """The report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def machine() -> str:
    """Where this runs: the processor's name and how many cores it may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def read_report(path: Path) -> ReplayReport:
    """Read what `to_json` wrote.

    Raises:
        WorkloadError: it cannot be read, or is no such report.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=ReplayReport)
    except OSError as error:
        raise WorkloadError(f"the report {path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path} is no report of `tokenspeed bench replay`: {error}") from error


def report_of(
    plan: SweepPlan,
    summaries: Sequence[Summary],
    *,
    version: str,
    machine: str,
    began_at: float,
    forced_lengths: bool,
    incomplete: str | None,
    launches: tuple[str, ...] = (),
) -> ReplayReport:
    """Put the runs of a sweep together. Runs that were stopped are shown, and not counted in."""
    runs = sorted(summaries, key=lambda run: (run.users or 0, run.repeat))
    levels: dict[int | None, dict[str, Estimate]] = {}
    for users in dict.fromkeys(run.users for run in runs):
        of = [run for run in runs if run.users == users and run.stopped is None]
        figures = {}
        for key, figure in FIGURES.items():
            values = [value for run in of if (value := figure.value(run)) is not None]
            if values:
                figures[key] = estimate(values)
        levels[users] = figures
    return ReplayReport(
        version=version,
        machine=machine,
        began_at=began_at,
        plan=plan,
        forced_lengths=forced_lengths,
        incomplete=incomplete,
        levels=tuple(
            Level(users=users, figures=figures, on_frontier=_on_frontier(figures, levels.values()))
            for users, figures in levels.items()
        ),
        runs=tuple(runs),
        launches=launches,
    )


def _on_frontier(figures: dict[str, Estimate], others: Iterable[dict[str, Estimate]]) -> bool:
    point = _point(figures)
    if point is None:
        return False
    return not any(
        beside is not None and beside != point and beside[0] >= point[0] and beside[1] >= point[1]
        for beside in map(_point, others)
    )


def _point(figures: dict[str, Estimate]) -> tuple[float, float] | None:
    """TPS of a user and output TPM."""
    if "tps_p50" not in figures:
        return None
    return figures["tps_p50"].mean, figures["output_tpm"].mean
