"""Drafts of requests that follow a grammar: what is drafted in vain, and what a token costs.

    python benchmarks/draft_grammar.py [--model qwen2.5-coder-0.5b] [--requests 12] [--repeats 3]

Each request is to write records that stand in its prompt once more, as JSON by a schema. Three ways
take turns on one loaded model: *whole*, drafts run to their end, and bitmasks made one after the
other once the forward is over (as it was); *cut*, without the guesses that the grammar forbids; and
*ahead*, as it is: cut, and with the bitmasks made while the forward runs. CPU time is that of all
threads. Checked: all ways give the same tokens. Appends to benchmarks/history/draft_grammar.jsonl.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenspeed import LLM, SamplingParams, __version__
from tokenspeed.control import Scheduler
from tokenspeed.core.constraint import StructuredOutputs
from tokenspeed.core.environment import let_threads_sleep
from tokenspeed.core.step import StepPlan, StepWork

HISTORY = Path(__file__).parent / "history" / "draft_grammar.jsonl"
WAYS = ("whole", "cut", "ahead")
SCHEMA = {
    "type": "object",
    "properties": {
        "findings": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "line": {"type": "integer"},
                    "severity": {"enum": ["error", "warning", "info"]},
                    "message": {"type": "string"},
                },
                "required": ["path", "line", "severity", "message"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["findings"],
    "additionalProperties": False,
}


def prompts(llm: LLM, count: int) -> list[list[int]]:
    """Reports of a linter, as the text of a tool, to be written down as JSON."""
    dice = random.Random(7)
    names = ("parser", "cache", "session", "index", "router", "buffer", "writer", "tokens")
    complaints = (
        "unused variable '{}' in function",
        "argument '{}' is never read",
        "'{}' may be used before it is assigned",
        "line too long where '{}' is called",
    )
    found = []
    for _ in range(count):
        lines = [
            f"src/{dice.choice(names)}/{dice.choice(names)}.py:{dice.randrange(1, 400)}: "
            f"{dice.choice(('error', 'warning', 'info'))}: "
            f"{dice.choice(complaints).format(dice.choice(names))}"
            for _ in range(6)
        ]
        text = "The linter says:\n\n" + "\n".join(lines)
        text += "\n\nGive all findings as JSON, each with its path, line, severity and message."
        found.append(llm.tokenizer.encode(llm.tokenizer.render_chat([
            {"role": "user", "content": text}
        ])))  # fmt: skip
    return found


def set_way(runner: Any, way: str) -> None:
    """Have a runner do as it did before: for this comparison alone."""
    runner._confinement.__dict__.pop("taken", None)
    runner._sampler.__dict__.pop("one_by_one", None)
    if way == "whole":
        runner._confinement.taken = lambda slot, guesses: len(guesses)
    if way != "ahead":
        usual = runner._sampler.one_by_one
        confined = runner._confinement._confined
        runner._sampler.one_by_one = lambda slots_S: (
            usual(slots_S) | np.isin(slots_S, list(confined))
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--running", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-history", action="store_true", help="append nothing")
    options = parser.parse_args()
    let_threads_sleep()
    params = SamplingParams(
        temperature=0.0,
        max_new_tokens=options.tokens,
        structured_outputs=StructuredOutputs(json=SCHEMA),
    )
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    planned = [0]
    texts = []
    # Only now, because it imports torch.
    from tokenspeed.engine.pace import learn_drafts, learn_pace  # noqa: PLC0415

    with LLM(options.model, threads=options.threads, max_running=options.running) as llm:
        asked = prompts(llm, options.requests)
        runner = llm._core.runner
        launch = runner.launch

        def counted(plan: StepPlan) -> Any:
            planned[0] += StepWork.of(plan).draft_tokens
            return launch(plan)

        runner.launch = counted
        for index in range(len(WAYS) * options.repeats + 1):
            # The first run compiles the grammar. Each has a control plane of its own, which has
            # neither its prompts in cache nor its answers to guess from.
            way = WAYS[index % len(WAYS)]
            set_way(runner, way)
            llm._core.control = control = Scheduler(runner._config)
            learn_pace(runner, runner._config, control)
            deque(learn_drafts(runner, runner._config, control), maxlen=0)
            planned[0] = 0
            before, began_s = llm.stats(), time.process_time()
            outputs = llm.generate(asked, params)
            cpu_s, after = time.process_time() - began_s, llm.stats()
            texts.append([output.completions[0].token_ids for output in outputs])
            assert texts[-1] == texts[0], f"{way} changed an answer"
            if not index:
                continue
            tokens = sum(len(text) for text in texts[-1])
            drafted = after.drafted_tokens - before.drafted_tokens
            rows[way].append(
                {
                    "output_tokens": tokens,
                    "steps": after.steps - before.steps,
                    "planned_tokens": planned[0],
                    "cut_tokens": planned[0] - drafted,
                    "in_vain_tokens": drafted - (after.accepted_tokens - before.accepted_tokens),
                    "cpu_ms_per_token": 1e3 * cpu_s / tokens,
                }
            )
    columns = ("output tokens", "steps", "planned", "cut", "in vain", "CPU ms a token (least)")
    table = Table("way", *columns)
    for way in WAYS:
        medians = {key: statistics.median(row[key] for row in rows[way]) for key in rows[way][0]}
        medians["cpu_ms_per_token"] = min(row["cpu_ms_per_token"] for row in rows[way])
        table.add_row(way, *(f"{value:.2f}".removesuffix(".00") for value in medians.values()))
    Console(width=120).print(table)
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "python": platform.python_version(),
        **{key: getattr(options, key) for key in ("model", "requests", "running", "threads")},
        **rows,
    }
    if not options.no_history:
        with HISTORY.open("a") as history:
            print(json.dumps(line), file=history)


if __name__ == "__main__":
    main()
