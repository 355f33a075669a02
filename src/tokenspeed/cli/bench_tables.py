"""Simulations as tables for the terminal."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from tokenspeed.bench.experiments import FloorExperiment, Oversubscription
    from tokenspeed.bench.report import Quantiles, Report

__all__ = ["floor_table", "oversubscription_table", "report_table"]


def report_table(summary: "Report") -> Table:
    """A simulation of a trace."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    hits = [f"{summary.hit_rate:.2%}"]
    if summary.lru_hit_rate is not None and summary.optimum_hit_rate is not None:
        hits += [
            f"plain LRU {summary.lru_hit_rate:.2%}",
            f"optimum {summary.optimum_hit_rate:.2%}",
        ]
    rows = {
        "requests": f"{summary.requests:,}: {summary.finished:,} finished, "
        f"{summary.refused:,} refused, {summary.rejected:,} too long",
        "replicas": f"{summary.config.replicas:,} of {summary.devices:,} devices in all, "
        f"busy {summary.busy_part:.0%} of the time",
        "virtual time": f"{summary.duration_s:,.1f} s, {summary.steps:,} steps of "
        f"{summary.mean_batch:.1f} answer tokens",
        "hit rate": "; ".join(hits),
        "TPM": f"{summary.output_tpm:,.0f} of answers ({summary.output_tpm_device:,.0f} a "
        f"device), {summary.total_tpm:,.0f} with prompts",
        "TPS of a user": _spread(summary.tps, "p1 p10 p50 p90", ".1f"),
        "intervals, ms": _spread(summary.interval_ms, "p50 p90 p99 max", ".1f"),
    }
    for entry in summary.ttft:
        rows[f"TTFT, turn {entry.turns}, s"] = (
            _spread(entry.ttft_s, "p50 p90 p99", ".2f") + f"  ({entry.requests:,} requests)"
        )
    if summary.floor is not None:
        rows[f"floor of {summary.floor.tps:g} TPS"] = (
            f"{summary.floor.users_below:,} users below ({summary.floor.users_below_part:.1%}), "
            f"{summary.floor.intervals_above_part:.1%} of intervals above "
            f"{summary.floor.bound_ms:.1f} ms"
        )
    rows["retractions, evictions"] = f"{summary.retractions:,}, {summary.evictions:,} pages"
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def floor_table(found: "FloorExperiment") -> Table:
    """What users got while a long prompt arrived."""
    table = Table(box=None, pad_edge=False)
    for name in ("FLOOR", "P99 OF USERS, MS", "LONGEST, MS", "PROMPT'S TTFT, S", "TPM MEANWHILE"):
        table.add_column(name, justify="left" if name == "FLOOR" else "right", no_wrap=True)
    for name, run in ((f"{found.tps_floor:g} TPS", found.held), ("off", found.off)):
        low, high = min(run.user_p99_ms), max(run.user_p99_ms)
        table.add_row(
            name,
            f"{low:.1f} to {high:.1f}",
            f"{run.interval_max_ms:.1f}",
            f"{run.ttft_s:.2f}",
            f"{run.window_tpm:,.0f}",
        )
    table.caption = (
        f"bound {found.bound_ms:.1f} ms: {'kept' if found.kept else 'NOT kept'} with the floor, "
        f"{'broken' if found.broken_without else 'not broken'} without; the floor costs "
        f"{found.window_cost:.1%} of TPM while the prompt is computed, {found.total_cost:.1%} of "
        "the whole run's"
    )
    table.caption_justify = "left"
    return table


def oversubscription_table(found: "Oversubscription") -> Table:
    """A pool too small beside two that fit."""
    table = Table(box=None, pad_edge=False)
    for name in ("RUN", "USERS", "POOL TOKENS", "FINISHED", "TPM", "RETRACTIONS"):
        table.add_column(name, justify="left" if name == "RUN" else "right", no_wrap=True)
    for name, users, summary in (
        ("twice too many", found.users, found.crowded),
        ("half the users", found.users // 2, found.half),
        ("twice the pool", found.users, found.roomy),
    ):
        scheduler = summary.config.scheduler
        table.add_row(
            name,
            f"{users:,}",
            f"{scheduler.groups[0].pages * scheduler.page_size:,}",
            f"{summary.finished:,} of {summary.requests:,}",
            f"{summary.output_tpm:,.0f}",
            f"{summary.retractions:,}",
        )
    table.caption = (
        f"twice too many users get {found.of_half:.1%} of the throughput of half the users, and "
        f"{found.of_roomy:.1%} of that of twice the pool"
    )
    table.caption_justify = "left"
    return table


def _spread(values: "Quantiles", names: str, form: str) -> str:
    return "  ".join(f"{name} {getattr(values, name):{form}}" for name in names.split())
