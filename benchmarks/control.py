"""What the control plane costs: a step at 8, 64 and 512 running requests, an admission, the index.

    python benchmarks/control.py

Step: plan + commit, and taking the outcome apart, with 200 more requests waiting, the floor and the
queue timeout on. Admission: the plan that admits a prompt of 100K tokens, 99% of them cached, and
its submission, which hashes it. Index: pages sealed, evicted and matched in pools of ten thousand
and of a million pages, a page. Every answer is checked: tokens come back to their requests, cached
counts are what they must be, the audit finds every page. Appends to
benchmarks/history/control.jsonl.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenspeed import __version__
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, SchedulerConfig
from tokenspeed.core.step import Int32Array, StepPlan

ROOT = Path(__file__).parents[1]
NO_STOP = np.empty(0, dtype=np.int32)
PAGE_SIZE = 32
STEPS = 400
WAITING = 200
VOCABULARY = 50_000
Result = TypeVar("Result")


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """The result of a call, and its microseconds."""
    begin = time.perf_counter_ns()
    result = call()
    return result, (time.perf_counter_ns() - begin) / 1000


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def tokens(seed: int, count: int) -> Int32Array:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count, dtype=np.int32)


class Driver:
    """A scheduler whose samples are the slot they were sampled for."""

    def __init__(self, **config: Any) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(
                page_size=PAGE_SIZE, tps_floor=70.0, queue_timeout_us=3_600_000_000, **config
            )
        )
        self.now_us = 0
        self.bound: dict[int, int] = {}

    def submit(self, request: int, prompt: Int32Array, outputs: int) -> float:
        return timed(
            lambda: self.scheduler.submit(
                request, prompt, max_new_tokens=outputs, stop_token_ids=NO_STOP
            )
        )[1]

    def step(self) -> tuple[StepPlan | None, float, float]:
        """One step; its plan, the microseconds of plan and commit, and of the outcome."""
        self.now_us += 10_000
        plan, planned_us = timed(lambda: self.scheduler.plan(self.now_us))
        if plan is None:
            return None, planned_us, 0.0
        for slot, request in zip(
            plan.bound_slots.tolist(), plan.bound_requests.tolist(), strict=True
        ):
            self.bound[slot] = request
        slots = plan.row_slots[plan.sample_rows]
        _, committed_us = timed(lambda: self.scheduler.commit(plan.step, slots, self.now_us))
        outcome, outcome_us = timed(self.scheduler.take_outcome)
        expected = [self.bound[slot] for slot in slots.tolist()]
        assert outcome.requests.tolist() == expected
        assert outcome.tokens.tolist() == slots.tolist()
        return plan, planned_us + committed_us, outcome_us


def step_us(running: int, context: int) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds of plan + commit, and of the outcome, while `running` requests decode."""
    pages = running * ((context + STEPS + 500) // PAGE_SIZE + 2)
    driver = Driver(
        groups=(CacheGroup(pages=pages),),
        slots_max=running,
        step_tokens_max=8192,
        context_max=2 * context,
    )
    for request in range(running):
        driver.submit(request, tokens(request, context), 10 * STEPS)
    while True:
        plan, _, _ = driver.step()
        if plan is not None and plan.decode_count == running:
            break
    for request in range(WAITING):
        driver.submit(running + request, tokens(10_000 + request, 1000), 50)
    found = []
    for _ in range(STEPS):
        plan, spent_us, outcome_us = driver.step()
        assert plan is not None and plan.decode_count == running
        found.append((spent_us, outcome_us))
    driver.scheduler.audit()
    assert driver.scheduler.stats().waiting == WAITING
    return spread([spent for spent, _ in found]), spread([outcome for _, outcome in found])


def admission_us(repeats: int = 9) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds of the plan that admits 100K tokens, 99% of them cached, and of the submit."""
    count = 100_000
    driver = Driver(
        groups=(CacheGroup(pages=5 * count // PAGE_SIZE),),
        slots_max=4,
        step_tokens_max=8192,
        context_max=count + 1000,
    )
    prompt = tokens(0, count)
    cached = count * 99 // 100 // PAGE_SIZE * PAGE_SIZE
    driver.submit(0, prompt, 1)
    while driver.step()[0] is not None:
        pass
    plans, submits = [], []
    for repeat in range(1, repeats + 1):
        changed = prompt.copy()
        changed[cached:] = tokens(repeat, count - cached)
        submits.append(driver.submit(repeat, changed, 1))
        driver.now_us += 10_000
        plan, spent_us = timed(lambda: driver.scheduler.plan(driver.now_us))
        assert plan is not None and plan.context_lens.tolist() == [cached]
        plans.append(spent_us)
        sampled = np.zeros(len(plan.sample_rows), dtype=np.int32)
        driver.scheduler.commit(plan.step, sampled, driver.now_us)
        driver.scheduler.take_outcome()
        assert driver.scheduler.plan(driver.now_us) is None
    return spread(plans), spread(submits)


def index_us(pages: int) -> dict[str, float]:
    """Microseconds a page: sealed into an empty pool, sealed by evicting another, matched."""
    context = min(pages // 4, 8192) * PAGE_SIZE
    driver = Driver(
        groups=(CacheGroup(pages=pages),),
        slots_max=1,
        step_tokens_max=context,
        context_max=context + PAGE_SIZE,
    )
    rounds = pages * PAGE_SIZE // context

    def run(request: int, seed: int) -> float:
        driver.submit(request, tokens(seed, context), 1)
        spent = 0.0
        while True:
            plan, spent_us, _ = driver.step()
            spent += spent_us
            if plan is None:
                return spent / (context // PAGE_SIZE)

    fresh = [run(seed, seed) for seed in range(rounds - 1)]
    evicting = [run(rounds + seed, rounds + seed) for seed in range(rounds)]
    assert driver.scheduler.stats().evictions > 0
    before = driver.scheduler.stats().cached_tokens
    matched = [run(3 * rounds + n, 2 * rounds - 1) for n in range(5)]
    assert driver.scheduler.stats().cached_tokens - before >= 5 * (context - PAGE_SIZE)
    driver.scheduler.audit()
    return {
        "seal": statistics.median(fresh),
        "seal by eviction": statistics.median(evicting),
        "match": statistics.median(matched),
    }


def main() -> None:
    """Measure, print and append to the history."""
    console = Console()
    sizes = {8: 50_000, 64: 50_000, 512: 5_000}
    steps = {running: step_us(running, context) for running, context in sizes.items()}
    table = Table("running", "context", "min", "median", "max", "outcome", title="us a step")
    for running, (spent, outcome) in steps.items():
        row = [f"{value:.1f}" for value in (*spent.values(), outcome["median"])]
        table.add_row(str(running), f"{sizes[running]:,}", *row)
    console.print(table)
    target = steps[64][0]["median"] < 50
    console.print(f"plan + commit at 64 running: {'met' if target else 'missed'} (50 us)")

    admitted, submitted = admission_us()
    console.print(
        f"100K tokens, 99% cached: admitted in {admitted['median']:.0f} us, submitted in "
        f"{submitted['median']:.0f} us: {'met' if admitted['median'] < 1000 else 'missed'} (1 ms)"
    )
    index = {pages: index_us(pages) for pages in (10_000, 1_000_000)}
    table = Table("pages", *index[10_000], title="us a page")
    for pages, costs in index.items():
        table.add_row(f"{pages:,}", *(f"{value:.3f}" for value in costs.values()))
    console.print(table)

    history = ROOT / "benchmarks" / "history" / "control.jsonl"
    with history.open("a") as file:
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": __version__,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "page_size": PAGE_SIZE,
            "waiting": WAITING,
            "steps": STEPS,
            "plan_commit_us": {str(n): spent for n, (spent, _) in steps.items()},
            "outcome_us": {str(n): outcome for n, (_, outcome) in steps.items()},
            "admission_us": admitted,
            "submit_us": submitted,
            "index_us_per_page": {str(pages): costs for pages, costs in index.items()},
        }
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
