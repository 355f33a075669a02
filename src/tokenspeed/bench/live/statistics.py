"""What repeats say of a figure: its mean, and how far off that may be."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Estimate", "estimate", "estimate_ratio"]

# Student's t, 97.5%, by degrees of freedom; beyond the table the normal distribution's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
_T_MANY = 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure from `count` repeats.

    Attributes:
        mean: their mean; of ratios the geometric one.
        low, high: a 95% interval of the mean (Student's t); None of a single value.
        values: the repeats.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value."""
    mean = statistics.fmean(values)
    half = _half_width(values)
    return Estimate(
        mean=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        values=tuple(values),
    )


def estimate_ratio(ratios: Sequence[float]) -> Estimate:
    """Of at least one ratio above 0, on a logarithmic scale: twice and half are as far from 1."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    half = _half_width(logs)
    return Estimate(
        mean=math.exp(mean),
        low=None if half is None else math.exp(mean - half),
        high=None if half is None else math.exp(mean + half),
        values=tuple(ratios),
    )


def _half_width(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    factor = _T[freedom - 1] if freedom <= len(_T) else _T_MANY
    return factor * statistics.stdev(values) / math.sqrt(len(values))
