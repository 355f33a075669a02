"""The same requests with drafts and without: whether anything is different but the time."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokenspeed import LLM, SamplingParams
from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.engine.outputs import Completion

__all__ = ["CASES", "Comparison", "compare", "prompts"]

OUTPUT = 48
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=OUTPUT, ignore_eos=True)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "lines": {"type": "array", "items": {"type": "integer"}, "maxItems": 6},
        "done": {"type": "boolean"},
    },
    "required": ["name", "lines", "done"],
    "additionalProperties": False,
}
TOOLS = {
    "type": "array",
    "minItems": 1,
    "maxItems": 2,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    "parameters": {
                        "type": "object",
                        "properties": {argument: {"type": "string", "maxLength": 20}},
                        "required": [argument],
                        "additionalProperties": False,
                    },
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for name, argument in (("read_file", "path"), ("run", "command"))
        ]
    },
}
CASES: dict[str, SamplingParams] = {
    "plain": GREEDY,
    "JSON schema": SamplingParams(
        temperature=0.0, max_new_tokens=OUTPUT, structured_outputs=StructuredOutputs(json=SCHEMA)
    ),
    "tools": SamplingParams(
        temperature=0.0, max_new_tokens=OUTPUT, structured_outputs=StructuredOutputs(json=TOOLS)
    ),
    "stop strings": SamplingParams(
        temperature=0.0, max_new_tokens=OUTPUT, stop=("return", "):", "\n\n")
    ),
    "penalties": SamplingParams(
        temperature=0.0, max_new_tokens=OUTPUT, repetition_penalty=1.1, frequency_penalty=0.2
    ),
    "log-probabilities": SamplingParams(temperature=0.0, max_new_tokens=OUTPUT, logprobs=2),
    "sampled": SamplingParams(temperature=0.7, top_p=0.95, max_new_tokens=OUTPUT, seed=11),
    "sampled, penalties": SamplingParams(
        temperature=0.8, top_k=40, presence_penalty=0.3, min_new_tokens=8, max_new_tokens=OUTPUT,
        seed=12,
    ),
    "sampled, schema": SamplingParams(
        max_new_tokens=OUTPUT, seed=13, structured_outputs=StructuredOutputs(json=SCHEMA)
    ),
}  # fmt: skip
_NAMES = (
    *("parse", "load", "write", "token", "page", "index"),
    *("cache", "total", "line", "value", "buffer", "request"),
)


@dataclass
class Comparison:
    """What became of one case.

    Attributes:
        requests: how many.
        different: the indices of those whose outcomes differ.
        drafted, accepted: tokens.
    """

    requests: int = 0
    different: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    retractions: int = 0


def prompts(llm: LLM, count: int, *, seed: int = 3) -> list[list[int]]:
    """Pieces of code, most of which are begun anew where the prompt ends; some of plain words."""
    dice = random.Random(seed)

    def function() -> str:
        name, one, other = (dice.choice(_NAMES) for _ in range(3))
        return (
            f"def {name}_{one}(self, {other}: int) -> list[str]:\n"
            f"    {one} = self.{name}({other}, {dice.randrange(100)})\n"
            f"    for {other} in range({dice.randrange(9)}, len({one})):\n"
            f"        {one}.append({name}[{other}])\n"
            f"    return {one}\n"
        )

    texts = []
    for index in range(count):
        code = "\n".join(function() for _ in range(1 + dice.randrange(5)))
        if index % 5 == 4:
            texts.append(" ".join(dice.choice(_NAMES) for _ in range(20 + dice.randrange(60))))
        else:
            cut = dice.randrange(len(code) // 4)
            texts.append(f"{code}\n# The same once more:\n\n{code[:cut]}")
    return [llm.tokenizer.encode(text) for text in texts]


def compare(
    model: str,
    *,
    count: int,
    cases: Sequence[str] = tuple(CASES),
    ways: Sequence[str] = ("together", "warm cache", "chunked", "retraction"),
    **options: Any,
) -> Iterator[tuple[str, str, Comparison]]:
    """Run all cases, each way; gives the way and the case as each is done.

    Args:
        model: as `LLM` takes it.
        count: prompts of each case.
        cases: of `CASES`.
        ways: "together" and "warm cache" on engines with room for all, "chunked" in steps of a few
            tokens, "retraction" with pages for few.
        options: of both engines.
    """
    if wide := [way for way in ways if way in ("together", "warm cache")]:
        sizes = {"max_context": 1024, "max_running": 16, **options}
        for case, found in _both(model, count, cases, repeats=len(wide), sizes=sizes):
            yield from ((way, case, one) for way, one in zip(wide, found, strict=True))
    for way, sizes in (
        ("chunked", {"max_context": 1024, "max_running": 8, "max_step_tokens": 24}),
        ("retraction", {"max_context": 320, "max_running": 16, "kv_cache_size_bytes": 0}),
    ):
        if way in ways:
            for case, found in _both(model, count, cases, repeats=1, sizes={**sizes, **options}):
                yield way, case, found[0]


def _both(
    model: str, count: int, cases: Sequence[str], *, repeats: int, sizes: dict[str, Any]
) -> Iterator[tuple[str, list[Comparison]]]:
    crowded = sizes.get("kv_cache_size_bytes") == 0
    if crowded:
        # Each request could fill the pool alone.
        with LLM(model, max_context=sizes["max_context"], max_running=1, speculate="off") as llm:
            page = llm.info.kv_size_bytes // llm.info.pages
            sizes = {**sizes, "kv_cache_size_bytes": page * (sizes["max_context"] // 32 + 1)}
    with LLM(model, speculate="off", **sizes) as off, LLM(model, speculate="auto", **sizes) as on:
        for case in cases:
            asked, params = prompts(off, count), CASES[case]
            if crowded:
                asked = [prompt[-96:] for prompt in asked]
                params = msgspec.structs.replace(params, max_new_tokens=160)
                for llm in (off, on):
                    # Answers are short, as far as the engine knows: it lets in too many.
                    llm.generate([[1, 2, 3]] * 64, SamplingParams(max_new_tokens=1))
            yield case, [_compare(off, on, asked, params) for _ in range(repeats)]


def _compare(off: LLM, on: LLM, asked: list[list[int]], params: SamplingParams) -> Comparison:
    count = len(asked)
    before = on.stats()
    each = [
        msgspec.structs.replace(params, seed=None if params.seed is None else params.seed + index)
        for index in range(count)
    ]
    texts = [[output.completions[0] for output in llm.generate(asked, each)] for llm in (off, on)]
    after = on.stats()
    return Comparison(
        requests=count,
        different=[
            index
            for index, (one, other) in enumerate(zip(*texts, strict=True))
            if _said(one) != _said(other)
        ],
        drafted=after.drafted_tokens - before.drafted_tokens,
        accepted=after.accepted_tokens - before.accepted_tokens,
        retractions=after.retractions - before.retractions,
    )


def _said(completion: Completion) -> tuple[Any, ...]:
    # A stop string is found in text, and tokens of a step that were on their way behind it are
    # dropped in both.
    return (
        completion.text,
        completion.token_ids,
        completion.logprobs,
        completion.finish_reason,
        completion.stop,
    )
