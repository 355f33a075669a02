"""Whether drafts change anything: the same prompts with drafts and without, in every way.

    python benchmarks/draft_equality.py [--model smollm2-135m] [--prompts 200]
        [--case plain "JSON schema" ...]

Greedy and sampled text, JSON schemas, tools, stop strings, penalties, log-probabilities; many
requests together, again with a warm cache, in chunks of a few tokens, with pages for so few that
requests are retracted. Tokens, texts, log-probabilities and ends are compared; ends with 1 where
one differs. Appends a line for each case and way to benchmarks/history/draft_equality.jsonl.

    python benchmarks/draft_equality.py --chi-square [--draws 5000]

Draws of four tokens each after 20 prompts of a tiny model, without drafts and with guesses in every
step, each by seeds of its own; the counts of the texts are held against chance: chi-square over all
prompts, p > 0.01.
"""

import argparse
import dataclasses
import json
import math
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.draft_equality import CASES, Comparison, compare  # noqa: E402

from tokenspeed import __version__  # noqa: E402
from tokenspeed.core.environment import let_threads_sleep  # noqa: E402

HISTORY = Path(__file__).parent / "history" / "draft_equality.jsonl"
PROMPTS = 20
TOKENS = 4


def equality(options: argparse.Namespace, console: Console) -> bool:
    """Compare, print and tell whether all is equal."""
    table = Table("way", "case", "requests", "different", "accepted", "drafted", "retractions")
    fine = True
    found = compare(
        options.model, count=options.prompts, cases=options.case, threads=options.threads
    )
    for way, case, outcome in found:
        fine = fine and not outcome.different
        table.add_row(
            way,
            case,
            *map(str, (outcome.requests, len(outcome.different), outcome.accepted)),
            *map(str, (outcome.drafted, outcome.retractions)),
        )
        console.print(f"{way}, {case}: {len(outcome.different)} of {outcome.requests} differ")
        if not options.no_history:
            append(options.model, way, case, outcome)
    console.print(table)
    return fine


def append(model: str, way: str, case: str, outcome: Comparison) -> None:
    """Add a line to the history."""
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "python": platform.python_version(),
        "model": model,
        "way": way,
        "case": case,
        **dataclasses.asdict(outcome),
    }
    with HISTORY.open("a") as history:
        print(json.dumps(line), file=history)


def chi_square(one: Counter[tuple[int, ...]], other: Counter[tuple[int, ...]]) -> tuple[float, int]:
    """The statistic of two such counts, and its degrees of freedom. Rare texts share a cell."""
    cells = []
    rare = np.zeros(2)
    for text in one | other:
        pair = np.array([one[text], other[text]], dtype=np.float64)
        if pair.sum() < 20:
            rare += pair
        else:
            cells.append(pair)
    counts = np.array([*cells, *([rare] if rare.sum() else [])])
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def chance(statistic: float, freedom: int) -> float:
    """That of so great a chi-square or a greater one: the tail of the normal distribution which
    its cube root nearly has (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    normal = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(normal / math.sqrt(2))


def distribution(options: argparse.Namespace, console: Console) -> bool:
    """Draw, print and tell whether the counts are likely to come from one distribution."""
    # Only now, because it imports torch.
    from tests.support.tiny_draws import TinyDraws  # noqa: PLC0415

    statistics, freedoms = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        draws = TinyDraws(Path(folder))
        for prompt in range(PROMPTS):
            counts = [
                draws.draw(
                    prompt,
                    count=options.draws,
                    tokens=TOKENS,
                    first_seed=1_000_000 * (2 * prompt + drafts),
                    drafts=drafts,
                )
                for drafts in (False, True)
            ]
            statistic, freedom = chi_square(counts[0], counts[1])
            statistics, freedoms = statistics + statistic, freedoms + freedom
            console.print(
                f"prompt {prompt}: {freedom + 1} cells, p = {chance(statistic, freedom):.3f}"
            )
        draws.close()
    console.print(
        f"all: chi-square {statistics:.1f} with {freedoms} degrees of freedom, "
        f"p = {chance(statistics, freedoms):.3f}; {draws.accepted} of {draws.drafted} guesses "
        "were right"
    )
    return chance(statistics, freedoms) > 0.01 and draws.accepted > 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-history", action="store_true", help="append nothing")
    parser.add_argument("--chi-square", action="store_true")
    parser.add_argument("--draws", type=int, default=5000)
    options = parser.parse_args()
    let_threads_sleep()
    console = Console(width=120)
    fine = distribution(options, console) if options.chi_square else equality(options, console)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
