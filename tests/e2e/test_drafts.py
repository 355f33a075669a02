"""Drafts on a real model: they are made, some are right, and nothing of any answer is different."""

import asyncio

import pytest

from tests.support.draft_equality import CASES, compare
from tokenspeed import AsyncLLM, SamplingParams
from tokenspeed.core.step import FinishReason
from tokenspeed.engine.outputs import TextDelta
from tokenspeed.loader import ModelFiles

# More than run at once.
PROMPTS, RUNNING = 8, 6


def check(model: ModelFiles, cases: tuple[str, ...], ways: tuple[str, ...]) -> None:
    options = {"count": PROMPTS, "max_running": RUNNING}
    found = list(compare(str(model.path), cases=cases, ways=ways, **options))
    assert [(way, case) for way, case, outcome in found if outcome.different] == []
    accepted = sum(outcome.accepted for _, _, outcome in found)
    drafted = sum(outcome.drafted for _, _, outcome in found)
    assert 0 < accepted < drafted
    if "retraction" in ways:
        assert sum(outcome.retractions for _, _, outcome in found) > 0


def test_answers_are_those_without_drafts(smollm2: ModelFiles) -> None:
    check(smollm2, ("plain", "JSON schema", "stop strings"), ("together",))


@pytest.mark.slow
def test_answers_are_those_without_drafts_in_every_way(smollm2: ModelFiles) -> None:
    ways = ("together", "warm cache", "chunked", "retraction")
    check(smollm2, tuple(CASES), ways)


def test_an_answer_that_a_stop_string_ends_knows_its_guesses(smollm2: ModelFiles) -> None:
    code = "def load(self, page: int) -> list[str]:\n    token = self.find(page, 12)\n" * 4

    async def ask(llm: AsyncLLM, *stop: str) -> tuple[str, int, TextDelta]:
        params = SamplingParams(temperature=0.0, max_new_tokens=100, stop=stop)
        deltas = [delta async for delta in llm.generate(f"{code}\n# Once more:\n{code}", params)]
        return (
            "".join(delta.text for delta in deltas),
            sum(len(delta.token_ids) for delta in deltas),
            deltas[-1],
        )

    async def main() -> None:
        async with await AsyncLLM.start(str(smollm2.path), max_context=512) as llm:
            # The second time nearly every token is foreseen.
            text, _, _ = await ask(llm)
            _, _, whole = await ask(llm)
            assert whole.accepted_tokens > 0
            _, count, last = await ask(llm, text[40:150])
            assert last.finish_reason == FinishReason.STOP
            assert 0 < last.accepted_tokens < count < 100
            assert last.accepted_tokens <= last.drafted_tokens

    asyncio.run(main())
