"""The sown bugs keep up with the code; that they are caught is `make check-control`'s to show."""

from pathlib import Path

import pytest

from tests.proof.build import CONTROL
from tests.proof.mutations import BUGS, Bug, MovedOn, sow


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_bug_can_be_sown(bug: Bug, tmp_path: Path) -> None:
    sown = sow(bug, CONTROL, tmp_path)
    assert (sown / bug.file).read_text() != (CONTROL / bug.file).read_text()


def test_a_bug_whose_place_is_gone_is_reported(tmp_path: Path) -> None:
    bug = Bug(what="nothing", file="ids.h", old="no such text", new="")
    with pytest.raises(MovedOn, match=r"found 0 times.*bugs\.toml"):
        sow(bug, CONTROL, tmp_path)


def test_there_are_enough_bugs() -> None:
    assert len({bug.what for bug in BUGS}) == len(BUGS) >= 20
