"""Sows the bugs of bugs.toml, one at a time, into copies of the control plane."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUGS", "Bug", "MovedOn", "sow"]


class MovedOn(Exception):
    """The text a bug replaces is not in the source exactly once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bug:
    """What is wrong, and how it is made wrong: `old` becomes `new` in `file`."""

    what: str
    file: str
    old: str
    new: str


BUGS = tuple(
    Bug(**bug) for bug in tomllib.loads((Path(__file__).parent / "bugs.toml").read_text())["bug"]
)


def sow(bug: Bug, control: Path, into: Path) -> Path:
    """Copies the control plane with the bug in it to a folder.

    Raises:
        MovedOn: the text to replace is not there exactly once.
    """
    for file in sorted(control.iterdir()):
        text = file.read_text()
        if file.name == bug.file:
            if text.count(bug.old) != 1:
                raise MovedOn(
                    f"{bug.what}: wanted once in {bug.file}, found {text.count(bug.old)} times: "
                    f"{bug.old!r}; sow it anew in tests/proof/bugs.toml"
                )
            text = text.replace(bug.old, bug.new)
        target = into / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return into
