"""Threads with room to recurse in."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["TRIAL_STACK_SIZE_BYTES", "deep_stacks"]

TRIAL_STACK_SIZE_BYTES = 4 << 20
"""The stack on which a constraint is tried out."""

_STACK_SIZE_BYTES = 16 << 20


@contextmanager
def deep_stacks() -> Iterator[None]:
    """Threads that start in it have stacks deeper than a trial's: what did not end the trial's
    process does not end the engine."""
    before = threading.stack_size(_STACK_SIZE_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)
