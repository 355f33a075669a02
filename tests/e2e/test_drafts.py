"""Drafts on a real model: they are made, some are right, and nothing of any answer is different."""

import pytest

from tests.support.draft_equality import CASES, compare
from tokenspeed.loader import ModelFiles


def check(model: ModelFiles, count: int, cases: tuple[str, ...], ways: tuple[str, ...]) -> None:
    found = list(compare(str(model.path), count=count, cases=cases, ways=ways))
    assert [(way, case) for way, case, outcome in found if outcome.different] == []
    accepted = sum(outcome.accepted for _, _, outcome in found)
    drafted = sum(outcome.drafted for _, _, outcome in found)
    assert 0 < accepted < drafted
    if "retraction" in ways:
        assert sum(outcome.retractions for _, _, outcome in found) > 0


def test_answers_are_those_without_drafts(smollm2: ModelFiles) -> None:
    check(smollm2, 20, ("plain", "JSON schema", "stop strings"), ("together",))


@pytest.mark.slow
def test_answers_are_those_without_drafts_in_every_way(smollm2: ModelFiles) -> None:
    ways = ("together", "warm cache", "chunked", "retraction")
    check(smollm2, 20, tuple(CASES), ways)
