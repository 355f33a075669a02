"""Draws TPS of a user against TPM, one curve a server, as PNG and as a page without other files."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from tokenspeed.bench.live.report import FIGURES, ReplayReport
from tokenspeed.bench.live.statistics import Estimate
from tokenspeed.bench.plots import check_plotting

__all__ = ["draw_frontier", "write_page"]

_SIZE_INCHES = (7.0, 4.5)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}pre{white-space:pre-wrap}.note{color:#a00}"
)


def draw_frontier(reports: Sequence[ReplayReport], *, title: str) -> bytes:
    """A PNG. Each point is a number of users, with a 95% interval where runs were repeated.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_plotting()
    # A figure of its own: pyplot keeps figures in global state and asks for a display.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=_SIZE_INCHES)
    axes = figure.subplots()
    for report in reports:
        levels = [level for level in report.levels if "tps_p50" in level.figures]
        if not levels:
            continue
        tps = [level.figures["tps_p50"] for level in levels]
        tpm = [level.figures["output_tpm"] for level in levels]
        axes.errorbar(
            [entry.mean for entry in tps],
            [entry.mean for entry in tpm],
            xerr=[_half(entry) for entry in tps],
            yerr=[_half(entry) for entry in tpm],
            marker="o",
            capsize=3,
            label=report.plan.label,
        )
        for level, x, y in zip(levels, tps, tpm, strict=True):
            if level.users is not None:
                axes.annotate(
                    f"{level.users} {'user' if level.users == 1 else 'users'}",
                    (x.mean, y.mean),
                    textcoords="offset points",
                    xytext=(6, 5),
                )
    axes.set(xlabel="TPS of a user (median)", ylabel="output tokens a minute", title=title)
    axes.margins(x=0.15, y=0.12)  # The points' words stand within.
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(reports) > 1:
        axes.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()


def write_page(reports: Sequence[ReplayReport], folder: Path, *, title: str) -> list[Path]:
    """Write frontier.png and report.html; their paths."""
    picture = draw_frontier(reports, title=title)
    (folder / "frontier.png").write_bytes(picture)
    (folder / "report.html").write_text(_page(reports, picture, title))
    return [folder / "frontier.png", folder / "report.html"]


def _half(entry: Estimate) -> float:
    return 0.0 if entry.high is None else entry.high - entry.mean


def _page(reports: Sequence[ReplayReport], picture: bytes, title: str) -> str:
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f'<img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    ]
    for report in reports:
        plan = report.plan
        parts.append(f"<h2>{html.escape(plan.label)}</h2>")
        parts.append(
            f"<p>{html.escape(plan.model)}; {html.escape(plan.workload)}: {plan.sessions} "
            f"sessions, {plan.turns} turns; "
            f"{html.escape(', '.join(f'{k} {v}' for k, v in plan.settings.items()))}; "
            f"{html.escape(report.machine)}; TokenSpeed {html.escape(report.version)}</p>"
        )
        if report.incomplete is not None:
            parts.append(f"<p class=note>Not whole: {html.escape(report.incomplete)}</p>")
        parts += [f"<pre>{html.escape(launch)}</pre>" for launch in report.launches]
        parts.append(_table(report))
        # What the tables leave out, for whoever has only this file. No text ends the element.
        data = report.to_json().decode().replace("<", "\\u003c")
        parts.append(f'<script type="application/json">{data}</script>')
    return "\n".join(parts) + "\n"


def _table(report: ReplayReport) -> str:
    head = "".join(f"<th>{html.escape(figure.name)}</th>" for figure in FIGURES.values())
    rows = []
    for level in report.levels:
        name = "open loop" if level.users is None else str(level.users)
        mark = " *" if level.on_frontier else ""
        cells = "".join(f"<td>{_cell(level.figures.get(key))}</td>" for key in FIGURES)
        rows.append(f"<tr><td>{name}{mark}</td>{cells}</tr>")
    return (
        f"<table><tr><th>users</th>{head}</tr>{''.join(rows)}</table>"
        "<p>* on the frontier: no other row has both more TPS and more TPM.</p>"
    )


def _cell(entry: Estimate | None) -> str:
    if entry is None:
        return ""
    text = f"{entry.mean:,.4g}"
    return text if entry.high is None else f"{text} &plusmn; {entry.high - entry.mean:,.2g}"
