"""Shows how far an engine's load has come."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from tokenspeed import loader
from tokenspeed.engine.wire import LoadProgress

__all__ = ["load_progress"]

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def load_progress() -> Iterator[Callable[[LoadProgress], None]]:
    """Bars on a terminal; elsewhere one log line as each stage ends."""
    with loader.terminal_progress() as bars:

        def show(progress: LoadProgress) -> None:
            if bars is not None:
                bars.update(progress.stage, progress.done, progress.total, progress.unit)
            elif progress.done == progress.total:
                _log.info("%s: %d %s", progress.stage, progress.done, progress.unit)

        yield show
