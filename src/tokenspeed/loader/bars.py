"""How a terminal shows how far a download or a load has come."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich import progress as bars
from rich.console import Console

from tokenspeed.loader.progress import Progress

__all__ = ["RichProgress", "terminal_progress"]


class RichProgress(Progress):
    """Progress bars in a terminal, one for each stage; used as a context manager.

    Args:
        console: where to draw; stderr if None, so that a command's output stays clean.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[amount]}"),
            bars.TimeElapsedColumn(),
            console=console or Console(stderr=True),
        )
        self._tasks: dict[str, bars.TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
        """Move a stage's bar, adding it when it is new."""
        amount = _amount(done, total, unit)
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, amount=amount)
        self._bars.update(self._tasks[stage], completed=done, total=total, amount=amount)


@contextmanager
def terminal_progress() -> Iterator[Progress | None]:
    """Bars where stderr is a terminal; None where it is a file or a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    with RichProgress() as shown:
        yield shown


def _amount(done: int, total: int | None, unit: str) -> str:
    if unit != "bytes":
        return f"{done}/{total} {unit}" if total is not None else f"{done} {unit}"
    megabytes = f"{done / 1e6:,.0f}"
    return f"{megabytes}/{total / 1e6:,.0f} MB" if total is not None else f"{megabytes} MB"
