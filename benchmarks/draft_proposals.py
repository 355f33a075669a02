"""What a draft model brings one user, by how many tokens it is asked for behind each step.

    python benchmarks/draft_proposals.py [--model qwen2.5-coder-1.5b] [--draft qwen2.5-coder-0.5b]
        [--tokens 64] [--threads 1]

The control plane is left out: each step asks for the same number, and verifies what came of the one
before. CPU time of all threads is told first, since it tells more than the clock where the machine
has other work; prompts are not in it. Answers are checked to be the same, whatever was proposed.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.unit.execution.tiny import GREEDY, Planner, Request, bind

from tokenspeed import loader
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import let_threads_sleep

PROMPTS = (
    "Write a Python class for a binary search tree with insert, delete and in-order traversal.",
    "Explain step by step how quicksort works, then give code in C.",
    'def parse_arguments(argv):\n    """Parse command line arguments',
    "Write a SQL schema for a library with books, authors, loans, and three example queries.",
)
COUNTS = (0, 1, 2, 3, 4, 6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    let_threads_sleep()
    # Only now, because it imports torch.
    from tokenspeed.engine.build import build_engine  # noqa: PLC0415

    engine = build_engine(
        EngineConfig(
            model=options.model,
            speculate=f"draft:{options.draft}",
            max_context=1024,
            max_running=2,
            kv_cache_size_bytes=1 << 29,
            threads=options.threads,
            seed=0,
        )
    )
    runner = engine.core.runner
    tokenizer = loader.Tokenizer(Path(engine.info.tokenizer_dir))
    table = Table("asked for", "CPU ms a token", "tokens/s", "tokens a step", "accepted")
    wanted: list[list[int]] = []
    for count in COUNTS:
        answers, cpu_s, took_s, steps, drafted, accepted = [], 0.0, 0.0, 0, 0, 0
        for prompt in PROMPTS:
            planner = Planner(runner._config)
            request = Request(slot=0, prompt=tokenizer.encode(prompt))
            bind(runner, request, GREEDY)
            # None at all leaves the draft model out.
            asked = np.full(1 if count else 0, count, dtype=np.int32)
            plan = planner.plan([], [(request, len(request.prompt))])
            result = runner.launch(replace(plan, propose_counts=asked)).result()
            answer = result.tokens.tolist()
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            while len(answer) < options.tokens:
                draft = result.proposed_tokens.tolist()
                plan = planner.plan([request], drafts={0: draft})
                result = runner.launch(replace(plan, propose_counts=asked)).result()
                row, counting = result.tokens.tolist(), 1
                while counting <= len(draft) and row[counting - 1] == draft[counting - 1]:
                    counting += 1
                planner.landed(request, draft, counting)
                answer += row[:counting]
                steps += 1
                drafted += len(draft)
                accepted += counting - 1
            cpu_s += time.process_time() - began_cpu_s
            took_s += time.perf_counter() - began_s
            answers.append(answer)
        tokens = sum(map(len, answers)) - len(answers)
        table.add_row(
            str(count),
            f"{1e3 * cpu_s / tokens:.1f}",
            f"{tokens / took_s:.1f}",
            f"{tokens / steps:.2f}",
            f"{accepted} of {drafted}",
        )
        answers = [answer[: options.tokens] for answer in answers]
        wanted = wanted or answers
        if answers != wanted:
            raise SystemExit(f"{count} proposals a step changed an answer")
    engine.core.close()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
