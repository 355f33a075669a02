"""How far a download or a load has come."""

from typing import Protocol

__all__ = ["Progress"]


class Progress(Protocol):
    """Told how far each stage of a download or a load has come."""

    def update(self, stage: str, done: int, total: int | None, unit: str) -> None:
        """Take a stage's progress.

        Args:
            stage: what is being done, in words; the same words for the same stage.
            done: units done so far, not since the last call.
            total: units in all, or None while that is unknown.
            unit: "bytes", "packages", "files" or "tensors".
        """
