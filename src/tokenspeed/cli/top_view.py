"""How `tokenspeed top` draws one look at a server."""

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

__all__ = ["frame"]

_SESSIONS_SHOWN = 20
_BAR_CELLS = 16
_MAP_ROWS = 3
_ID_CHARS = 24
_ACTIVE, _CACHED, _FREE, _HOST = "blue", "cyan", "bright_black", "magenta"


def frame(
    *, status: dict[str, Any], sessions: dict[str, Any], cache: dict[str, Any] | None, width: int
) -> RenderableType:
    """One look.

    Args:
        status, sessions, cache: what the operations port's routes of these names tell.
        width: columns of the terminal.
    """
    parts: list[RenderableType] = [_head(status), _sessions(sessions)]
    if cache is not None:
        parts.append(_cache(cache, width))
    return Group(*parts)


def _head(status: dict[str, Any]) -> RenderableType:
    engine, stats, health = status["engine"], status["stats"], status["health"]
    text = Text()
    healthy = health["healthy"]
    state = "draining" if status["draining"] else "healthy" if healthy else health["reason"]
    good = healthy and not status["draining"]
    text.append(f"{_safe(state)}  ", style="green" if good else "red")
    if stats is not None and engine is not None:
        prompt, cached = stats["prompt_tokens"], stats["cached_tokens"]
        floor = "off" if engine["tps_floor"] is None else f"{engine['tps_floor']:g}/s"
        text.append(
            f"{stats['output_tokens_per_s']:.0f} tokens/s  "
            f"running {stats['running']}/{engine['slots_max']}  waiting {stats['waiting']}  "
            f"from cache {_share(cached, prompt)}  floor {floor}  "
            f"under it {stats['timing']['floor_violations']} intervals  "
            f"preempted {stats['retractions'] + stats['parkings']}  refused {stats['refusals']}"
        )
    title = "no engine" if engine is None else _safe(engine["model_name"])
    return Panel(text, title=Text(f"TokenSpeed {status['version']} · {title}"), title_align="left")


def _sessions(sessions: dict[str, Any]) -> RenderableType:
    table = Table(expand=True, box=None, header_style="dim")
    table.add_column("id", no_wrap=True)
    table.add_column("tenant", no_wrap=True, min_width=10)
    table.add_column("state", no_wrap=True, min_width=9)
    for name in ("turns", "context", "cached"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    table.add_column("tokens/s / floor", no_wrap=True, min_width=_BAR_CELLS + 10)
    shown = sessions["sessions"][:_SESSIONS_SHOWN]
    for session in shown:
        samples = [sample for request in session["running"] for sample in request["samples"]]
        rate = _least(sample.get("tokens_per_s") for sample in samples)
        floor = _least(sample.get("floor_tokens_per_s") for sample in samples)
        table.add_row(
            str(session["session"]),
            Text(_safe(session["tenant"] or "-")),
            _state(samples),
            str(session["requests"]),
            f"{session['context_tokens']:,}",
            _share(session["cached_tokens"], session["prompt_tokens"]),
            _rate(session["tokens_per_s"] if rate is None else rate, floor),
        )
    hidden = len(sessions["sessions"]) - len(shown)
    if hidden:
        table.add_row("", f"and {hidden} more")
    if not shown:
        table.add_row("", "no requests yet")
    return table


def _cache(cache: dict[str, Any], width: int) -> RenderableType:
    device, host = cache["device"], cache["host"]
    total = device["total"] + host["total"]
    cells = max(20, width - 4) * _MAP_ROWS
    shown = (
        (device["active"], "█", _ACTIVE),
        (device["cached"], "▓", _CACHED),
        (device["free"], "░", _FREE),
        (host["cached"], "▓", _HOST),
        (host["free"], "░", _FREE),
    )
    text = Text(overflow="fold")
    left = cells
    for pages, mark, style in shown:
        count = min(left, max(1, round(cells * pages / total))) if pages else 0
        left -= count
        text.append(mark * count, style=style)
    text.append("\n")
    text.append(f"█ in use {device['active']:,}  ", style=_ACTIVE)
    text.append(f"▓ cached {device['cached']:,}  ", style=_CACHED)
    text.append(f"░ free {device['free']:,}  ", style=_FREE)
    if host["total"]:
        text.append(f"▓ on the host {host['cached']:,} of {host['total']:,}  ", style=_HOST)
    text.append(f"pages of {cache['page_tokens']} tokens; evicted {cache['evictions']:,}")
    return Panel(text, title="cache", title_align="left")


def _state(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return "idle"
    sample = samples[0]
    if sample["tokens"]:
        return "decoding"
    spent = sample["phases_ms"]
    if spent.get("prefill"):
        return "reading"
    return "restoring" if spent.get("restore") else "queued"


def _rate(rate: float | None, floor: float | None) -> Text:
    """A bar whose middle is the floor, where one is held."""
    if rate is None:
        return Text("-")
    full = max(rate, 2 * floor) if floor else max(rate, 1.0)
    filled = round(_BAR_CELLS * rate / full)
    slow = floor is not None and rate < floor
    text = Text("━" * filled, style="red" if slow else "green")
    text.append("─" * (_BAR_CELLS - filled), style="bright_black")
    text.append(f" {rate:.0f}", style="default")
    if floor:
        text.append(f" / {floor:.0f}", style="dim")
    return text


def _least(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"


def _safe(text: str) -> str:
    """Text that came with a request, without what a terminal would obey."""
    clean = "".join(char if char.isprintable() else "·" for char in text)
    return clean if len(clean) <= _ID_CHARS * 4 else clean[: _ID_CHARS * 4] + "…"
