"""Keeps finished runs in a folder, so that a sweep that was broken off goes on where it was."""

import dataclasses
from pathlib import Path

import msgspec

from tokenspeed.bench.live.records import Run
from tokenspeed.bench.live.report import SweepPlan
from tokenspeed.core.errors import ConfigError, WorkloadError

__all__ = ["RunStore"]


class RunStore:
    """`plan.json` says what is measured, `runs/` has a file for each run, written when it ended."""

    def __init__(self, folder: Path, plan: SweepPlan) -> None:
        """Open a folder, new or of the same plan; the server may have another address by now.

        Raises:
            ConfigError: it cannot be written, or holds something else.
        """
        self.folder = folder
        path = folder / "plan.json"
        try:
            (folder / "runs").mkdir(parents=True, exist_ok=True)
            if path.exists():
                kept = msgspec.json.decode(path.read_bytes(), type=SweepPlan)
                _check_same(kept, plan, folder)
            else:
                _write(path, msgspec.json.format(msgspec.json.encode(plan), indent=2))
        except OSError as error:
            raise ConfigError(f"--output {folder} cannot be written: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--output {folder} holds a plan.json of something else ({error}); name another "
                "folder"
            ) from error

    def load(self, users: int | None, repeat: int) -> Run | None:
        """A run that came to its end; None if there is none.

        Raises:
            WorkloadError: its file is damaged.
        """
        path = self._path(users, repeat)
        if not path.exists():
            return None
        try:
            run = msgspec.json.decode(path.read_bytes(), type=Run)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WorkloadError(
                f"{path} is no whole run: {error}; delete it to have it measured again"
            ) from error
        return run if run.stopped is None else None

    def save(self, run: Run) -> None:
        """Keep a run; one that was stopped is kept as well, and measured again next time."""
        _write(self._path(run.users, run.repeat), msgspec.json.encode(run))

    def _path(self, users: int | None, repeat: int) -> Path:
        name = "open" if users is None else f"users-{users}"
        return self.folder / "runs" / f"{name}-repeat-{repeat}.json"


def _check_same(kept: SweepPlan, plan: SweepPlan, folder: Path) -> None:
    for field in dataclasses.fields(SweepPlan):
        before, now = getattr(kept, field.name), getattr(plan, field.name)
        if field.name != "url" and before != now:
            raise ConfigError(
                f"--output {folder} holds runs with {field.name} {before!r}, but {now!r} is asked "
                "for; name another folder, or ask for the same to go on"
            )


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, whenever the process ends."""
    beside = path.with_suffix(".part")
    beside.write_bytes(data)
    beside.replace(path)
