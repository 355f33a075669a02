"""What the control plane costs: a step at 8, 64 and 512 running requests, an admission, the index.

    python benchmarks/control.py

Step: plan + commit, and taking the outcome apart, with 200 more requests waiting, the floor and the
queue timeout on. Admission: the plan that admits a prompt of 100K tokens, 99% of them cached, and
its submission, which hashes it. Index: pages sealed, evicted and matched in pools of ten thousand
and of a million pages, a page. Every answer is checked: tokens come back to their requests, cached
counts are what they must be, the audit finds every page. Drafts: what a token costs to be read into
an automaton, call included, and a step of 64 rows with 512 drafted tokens, all right. Proposals: a
step with a draft model that is always right, 8 tokens for each row. Appends to
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
from tokenspeed._control import SuffixAutomaton
from tokenspeed.control import Scheduler
from tokenspeed.core.config import CacheGroup, SchedulerConfig
from tokenspeed.core.step import Int32Array, StepPlan, StepResult, StepWork

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
    """A scheduler whose samples are the slot they were sampled for, plus `shift`, which grows by
    `drift` a step; its draft model knows that."""

    def __init__(self, *, tps_floor: float | None = 70.0, **config: Any) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(
                page_size=PAGE_SIZE,
                tps_floor=tps_floor,
                queue_timeout_us=3_600_000_000,
                **config,
            )
        )
        self.now_us = 0
        self.shift = 0
        self.drift = 0
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
        sampled = slots + np.int32(self.shift)
        self.shift += self.drift
        result = self._result(plan, sampled)
        _, committed_us = timed(
            lambda: self.scheduler.commit(plan.step, sampled, self.now_us, result=result)
        )
        outcome, outcome_us = timed(self.scheduler.take_outcome)
        expected = [self.bound[slot] for slot in slots.tolist()]
        assert outcome.requests.tolist() == expected, "all that is drafted is right"
        assert outcome.tokens.tolist() == sampled.tolist()
        return plan, planned_us + committed_us, outcome_us

    def _result(self, plan: StepPlan, sampled: Int32Array) -> StepResult:
        counts = plan.propose_counts
        if not len(counts):
            return StepResult(tokens=sampled, logprobs=None)
        proposed = np.repeat(plan.row_slots + np.int32(self.shift), counts)
        return StepResult(
            tokens=sampled,
            logprobs=None,
            proposed_starts=np.append(np.int32(0), counts.cumsum(dtype=np.int32)),
            proposed_tokens=proposed,
            proposed_chances=np.full(len(proposed), 0.95, dtype=np.float32),
        )


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


def draft_steps_us(running: int, context: int) -> dict[str, dict[str, float]]:
    """Microseconds of plan + commit without drafts and with them, the latter for each of a step's
    tokens too, all of whose drafts are right."""
    found: dict[str, dict[str, float]] = {}
    for name, most in (("no drafts", 0), ("drafts", 8 * running)):
        driver = Driver(
            tps_floor=None,
            groups=(CacheGroup(pages=running * ((context + 10_000) // PAGE_SIZE + 2)),),
            slots_max=running,
            step_tokens_max=1024 + running,
            context_max=2 * context,
            step_drafts_max=most,
        )
        for rows in range(1, 9):
            work = StepWork(decode_rows=rows, context_tokens=rows * context)
            driver.scheduler.observe(work, 9_000 + 100 * rows)
        for request in range(running):
            driver.submit(request, tokens(request, context), 45_000)
        # Nothing repeats until all prompts are there and read.
        spent = []
        for step in range(running * context // 1000 + 200 + STEPS):
            driver.shift = VOCABULARY + running * step
            spent.append(driver.step()[1])
        found[f"{name}, nothing repeats"] = spread(spent[-STEPS:])
        driver.shift = 0
        for _ in range(40):
            driver.step()
        spent, each = [], []
        for _ in range(STEPS):
            plan, spent_us, _ = driver.step()
            assert plan is not None
            spent.append(spent_us)
            each.append(spent_us / len(plan.sample_rows))
        found[f"{name}, all repeats"] = spread(spent)
        if most:
            found["for each of its tokens"] = spread(each)
            stats = driver.scheduler.stats()
            assert stats.accepted_tokens > 0.95 * stats.drafted_tokens > STEPS * running
        driver.scheduler.audit()
    return found


def proposal_steps_us(running: int) -> dict[str, dict[str, float]]:
    """Microseconds of plan + commit without a draft model and with one, whose proposals are all
    right; nothing repeats."""
    found = {}
    for name, length in (("no draft model", 0), ("a draft model", 8)):
        driver = Driver(
            tps_floor=None,
            groups=(CacheGroup(pages=running * (20_000 // PAGE_SIZE + 2)),),
            slots_max=running,
            step_tokens_max=1024 + running,
            context_max=20_000,
            step_drafts_max=8 * running,
            step_proposals_max=length * running,
            proposal_length_max=length,
        )
        for request in range(running):
            driver.submit(request, tokens(request, 1000), 15_000)
        driver.shift, driver.drift = VOCABULARY, running
        spent = [driver.step()[1] for _ in range(running + 100 + STEPS)]
        found[name] = spread(spent[-STEPS:])
        stats = driver.scheduler.stats()
        assert stats.accepted_tokens == stats.drafted_tokens
        assert stats.accepted_tokens >= (STEPS * running * length) // 2
        driver.scheduler.audit()
    return found


def automaton_us(context: int) -> dict[str, dict[str, float]]:
    """Microseconds and bytes a token: of tokens at random, and of text that repeats its own."""
    text = tokens(1, context)
    rng = np.random.default_rng(2)
    repeats = np.concatenate(
        [text[begin : begin + 100] for begin in rng.integers(0, 5_000, context // 100)]
    )
    found = {}
    for name, read in (("at random", text), ("repeating", repeats)):
        automaton = SuffixAutomaton()
        append = automaton.append
        listed = read.tolist()
        _, spent_us = timed(lambda: [append(token) for token in listed])  # noqa: B023
        found[name] = {
            "us": spent_us / len(listed),
            "bytes": automaton.size_bytes() / len(listed),
        }
    return found


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

    automaton = automaton_us(50_000)
    for name, each in automaton.items():
        console.print(f"reading text {name}: {each['us']:.2f} us and {each['bytes']:.0f} B a token")
    drafts = draft_steps_us(64, 50_000)
    table = Table("64 running, 50,000 tokens", "min", "median", "max", title="us a step")
    for name, spent in drafts.items():
        table.add_row(name, *(f"{value:.1f}" for value in spent.values()))
    console.print(table)

    proposals = {running: proposal_steps_us(running) for running in (1, 64)}
    table = Table("running", "", "min", "median", "max", title="us a step")
    for running, each in proposals.items():
        for name, spent in each.items():
            row = [f"{value:.1f}" for value in spent.values()]
            table.add_row(str(running), name, *row)
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
            "proposals_us": {str(n): each for n, each in proposals.items()},
            "admission_us": admitted,
            "submit_us": submitted,
            "index_us_per_page": {str(pages): costs for pages, costs in index.items()},
            "automaton_per_token": automaton,
            "draft_steps_us": drafts,
        }
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
