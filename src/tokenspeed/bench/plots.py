"""Draws a simulation's results; needs matplotlib, the extra `bench`."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from tokenspeed.bench.report import Report
from tokenspeed.bench.results import Results
from tokenspeed.core.errors import ConfigError

__all__ = ["check_plotting", "draw"]

_SIZE_INCHES = (7.0, 4.0)


def check_plotting() -> None:
    """Raises ConfigError where no plot can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--output draws plots, which needs matplotlib; "
            "install it with `pip install 'tokenspeed[bench]'`, or leave --output out"
        )


def draw(summary: Report, results: Results, folder: Path) -> list[Path]:
    """Write one PNG a plot into a folder; their paths.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_plotting()
    plots = {
        "throughput.png": _throughput,
        "tps.png": _tps,
        "ttft.png": _ttft,
        "intervals.png": _intervals,
        "hit_rate.png": _hit_rate,
    }
    paths = []
    for name, plot in plots.items():
        figure, axes = _figure()
        plot(axes, summary, results)
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        paths.append(folder / name)
    return paths


def _figure() -> tuple[Any, Any]:
    # A figure of its own: pyplot keeps figures in global state and asks for a display.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=_SIZE_INCHES)
    return figure, figure.subplots()


def _throughput(axes: Any, summary: Report, results: Results) -> None:
    # About 200 points, whatever the length.
    width_s = max(1, len(results.timeline) // 200)
    count = -(-len(results.timeline) // width_s)
    padded = np.zeros(count * width_s)
    padded[: len(results.timeline)] = results.timeline
    axes.plot(np.arange(count) * width_s, padded.reshape(count, width_s).mean(axis=1) * 60)
    axes.axhline(summary.output_tpm, linestyle="--", color="gray", label="mean")
    axes.set(xlabel="virtual time (s)", ylabel="answer tokens per minute", title=summary.trace)
    axes.legend()


def _tps(axes: Any, summary: Report, results: Results) -> None:
    several = results.emitted >= 2
    spans_us = np.maximum((results.last_us - results.first_us)[several], 1)
    values = np.sort((results.emitted[several] - 1) * 1e6 / spans_us)
    axes.plot(values, np.linspace(0, 1, len(values)))
    if summary.floor is not None:
        axes.axvline(summary.floor.tps, linestyle="--", color="gray", label="floor")
        axes.legend()
    axes.set(xlabel="TPS of one user", ylabel="part of requests", title="Speed of users")


def _ttft(axes: Any, summary: Report, results: Results) -> None:
    names = [entry.turns for entry in summary.ttft]
    places = np.arange(len(names))
    for shift, name in ((-0.25, "p50"), (0.0, "p90"), (0.25, "p99")):
        heights = [getattr(entry.ttft_s, name) for entry in summary.ttft]
        axes.bar(places + shift, heights, width=0.22, label=name)
    axes.set_xticks(places, names)
    axes.set(xlabel="turn of the session", ylabel="time to first token (s)", title="First token")
    axes.legend()


def _intervals(axes: Any, summary: Report, results: Results) -> None:
    if len(results.interval_us):
        part = 1 - np.cumsum(results.interval_counts) / results.interval_counts.sum()
        axes.step(results.interval_us / 1000, np.maximum(part, 1e-9), where="post")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(1e-5, 1.1)
    if summary.floor is not None:
        axes.axvline(summary.floor.bound_ms, linestyle="--", color="gray", label="floor's bound")
        axes.legend()
    axes.set(
        xlabel="time between two tokens (ms)", ylabel="part of intervals above", title="Intervals"
    )


def _hit_rate(axes: Any, summary: Report, results: Results) -> None:
    bars = {
        "plain LRU": summary.lru_hit_rate,
        "this scheduler": summary.hit_rate,
        "optimum": summary.optimum_hit_rate,
    }
    known = {name: 100 * rate for name, rate in bars.items() if rate is not None}
    axes.bar(list(known), list(known.values()), width=0.5)
    axes.set(ylabel="prompt tokens from cache (%)", title="Hit rate")
