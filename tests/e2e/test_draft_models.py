"""Answers with a draft model are those without, whatever they must follow or end at."""

import itertools
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from unittest import mock

import pytest

from tokenspeed import LLM, SamplingParams, StructuredOutputs, loader
from tokenspeed.core.stats import SchedulerStats
from tokenspeed.core.step import StepWork

PROMPTS = [
    "def fibonacci(n):\n    ",
    "The capital of France is",
    "Write a haiku about rivers, then explain it line by line.",
    "for index in range(10):\n    print(",
]
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["left", "right"]}, "size": {"type": "integer"}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
)
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_new_tokens=32),
    "drawn": SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_new_tokens=32),
    "penalised": SamplingParams(temperature=0.0, repetition_penalty=1.2, max_new_tokens=24),
    "stop": SamplingParams(temperature=0.0, stop=["\n"], max_new_tokens=48),
    "schema": SamplingParams(
        temperature=0.0,
        max_new_tokens=48,
        structured_outputs=StructuredOutputs(json=SCHEMA),
    ),
}


def answers(
    model: str,
    speculate: str,
    prompts: Sequence[str] = PROMPTS,
    ways: Mapping[str, SamplingParams] = MappingProxyType(PARAMS),
    **options: int,
) -> tuple[dict[str, list[tuple[list[int], str]]], SchedulerStats]:
    """Tokens and text of each prompt's answer, by how it was asked; and what the scheduler did."""
    sizes = {"max_context": 512, "kv_cache_size_bytes": 1 << 28, **options}
    # All steps take the same time, whatever else the machine does: what is asked of the draft model
    # follows from what steps cost.
    clock = itertools.count(0, 10_000)
    with (
        mock.patch("tokenspeed.engine.core._now_us", lambda: next(clock)),
        LLM(model, speculate=speculate, seed=0, **sizes) as llm,
    ):
        # A model is no cheaper than itself, so that it would be left alone: let it look so.
        for drafted, proposed, read in [(0, 0, 0), (3, 0, 0), (0, 3, 1), (0, 3, 100)] * 100:
            work = StepWork(
                decode_rows=1,
                context_tokens=64,
                draft_tokens=drafted,
                proposed_tokens=proposed,
                proposal_rounds=proposed,
                caught_up_tokens=read,
            )
            llm._core.control.observe(work, 30_000 + 100 * drafted + 10 * proposed + read)
        found = {}
        # The second time beginnings are cached.
        for name, params in [*ways.items(), *ways.items()]:
            made = llm.generate(list(prompts), params)
            outputs = [output.completions[0] for output in made]
            found[name] = [(output.token_ids, output.text) for output in outputs]
        return found, llm._core.control.stats()


@pytest.fixture(scope="module")
def without(smollm2: loader.ModelFiles) -> dict[str, list[tuple[list[int], str]]]:
    """The answers of the model alone."""
    return answers(str(smollm2.path), "off")[0]


@pytest.mark.parametrize("options", [{}, {"overlap_depth": 1}, {"max_running": 2}])
def test_answers_with_a_draft_model_are_those_without(
    smollm2: loader.ModelFiles,
    without: dict[str, list[tuple[list[int], str]]],
    options: dict[str, int],
) -> None:
    model = str(smollm2.path)
    found, stats = answers(model, f"draft:{model}", **options)
    assert found == without
    assert stats.proposed_tokens > 0


def test_so_they_are_where_requests_are_retracted_and_their_pages_come_from_the_host(
    smollm2: loader.ModelFiles,
) -> None:
    model = str(smollm2.path)
    # Prompts of a page and more, so that there is something to be found again.
    words = ", ".join(["tree", "sun", "house", "river"] * 2)
    prompts = [f"{n}. {words}: {prompt}" for n in range(4) for prompt in PROMPTS]
    few = {"kv_cache_size_bytes": 13 << 20, "host_cache_size_bytes": 64 << 20, "page_size": 16}
    # Answers get longer than those before, so that more were let in than there are pages for.
    ways = {
        "short": SamplingParams(temperature=0.0, max_new_tokens=16, ignore_eos=True),
        "long": SamplingParams(temperature=0.0, max_new_tokens=80, ignore_eos=True),
        "drawn": SamplingParams(temperature=0.9, seed=3, max_new_tokens=80, ignore_eos=True),
    }
    wanted, _ = answers(model, "off", prompts, ways)
    found, stats = answers(model, f"draft:{model}", prompts, ways, **few)
    print(f"{stats.retractions} retractions, {stats.loads} loads, {stats.proposed_tokens} proposed")
    assert found == wanted
    assert stats.proposed_tokens > 0
    assert stats.retractions > 0
    assert stats.loads > 0


@pytest.mark.slow
def test_answers_of_a_larger_model_with_a_smaller_one_beside_it_are_its_own() -> None:
    ways = {name: PARAMS[name] for name in ("greedy", "drawn", "schema")}
    wanted, _ = answers("qwen2.5-coder-1.5b", "off", PROMPTS[:2], ways)
    found, _ = answers("qwen2.5-coder-1.5b", "draft:qwen2.5-coder-0.5b", PROMPTS[:2], ways)
    assert found == wanted
