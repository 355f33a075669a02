"""Compares two sweeps of the same work, run by run: ratios of pairs, not of averages."""

from dataclasses import dataclass

from tokenspeed.bench.live.report import FIGURES, ReplayReport
from tokenspeed.bench.live.statistics import Estimate, estimate_ratio
from tokenspeed.core.errors import WorkloadError

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure at one number of users.

    Attributes:
        users: None in an open loop.
        figure: a key of `FIGURES`.
        first, second: means of both.
        ratio: second over first, from pairs of runs with the same users and repeat.
    """

    users: int | None
    figure: str
    first: float
    second: float
    ratio: Estimate

    @property
    def is_better(self) -> bool | None:
        """Whether the second is better beyond the repeats' spread; None if that is not known."""
        low, high = self.ratio.low, self.ratio.high
        if low is None or high is None or low <= 1 <= high:
            return None
        return (low > 1) == FIGURES[self.figure].more_is_better


def compare(first: ReplayReport, second: ReplayReport) -> list[Comparison]:
    """All figures that both have.

    Raises:
        WorkloadError: they are not of the same work, or have no run in common.
    """
    for field in ("workload_digest", "settings"):
        ours, theirs = getattr(first.plan, field), getattr(second.plan, field)
        if ours != theirs:
            raise WorkloadError(
                f"the reports cannot be compared: their {field} are {ours!r} and {theirs!r}; "
                "measure both with the same sessions and flags"
            )
    runs = {(run.users, run.repeat): run for run in first.runs if run.stopped is None}
    pairs = [
        (runs[run.users, run.repeat], run)
        for run in second.runs
        if run.stopped is None and (run.users, run.repeat) in runs
    ]
    if not pairs:
        raise WorkloadError(
            "the reports cannot be compared: no run of one has the users and repeat of one of the "
            "other"
        )
    found = []
    for users in dict.fromkeys(run.users for run, _ in pairs):
        for key, figure in FIGURES.items():
            values = [
                (before, after)
                for one, other in pairs
                if one.users == users
                and (before := figure.value(one))
                and (after := figure.value(other))
            ]
            if values:
                found.append(
                    Comparison(
                        users=users,
                        figure=key,
                        first=sum(before for before, _ in values) / len(values),
                        second=sum(after for _, after in values) / len(values),
                        ratio=estimate_ratio([after / before for before, after in values]),
                    )
                )
    return found
