"""What drafts bring on sessions of coding agents, and what they cost where nothing repeats.

    python benchmarks/drafts.py [--model qwen2.5-coder-0.5b] [--speculate auto|draft:MODEL]
        [--against off|suffix] [--sessions-file FILE]
        [--mode recorded own random] [--concurrency 1 4 8] [--sessions 8] [--turns 6]
        [--minutes 4] [--repeats 2]

On one engine in this process, drafts on (`--speculate`) and off (or, with `--against suffix`, out
of text alone) take turns (A B A B), each with a cache of its own and the same prompts. Where there
is a draft model it is left out of the other side's steps altogether. Three modes:

- `recorded`: the conversations as they were recorded, the recorded answers taking the place of what
  the model samples. Acceptance is that of a real agent's text, and the forward is the model's.
- `own`: the model's own answers, sent back as the history, at `--temperature`.
- `random`: prompts and answers of random tokens, of which drafts foresee none. Target: no less than
  0.98 of the speed without drafts. Runs differ by more than that among themselves, so here steps
  with drafts and without take turns, and the ratio is that of pairs.

Checked: both ways give the same answers, and forced ones are those forced. Reported are the tokens
a second that a user sees (median over turns), output tokens a minute of all, tokens of a step of a
request, and the ratio on/off of each turn: of all, and of those that mostly quote their prompts.
Targets: 1.5 in the median of quoting turns at concurrency 1; no less than 1.0 at 8. `--minutes`
bounds the first run of a mode and concurrency; the others do the turns that it came through with.
CPU time of all threads, prompts included, is printed because it tells more than the clock where the
machine has other work.

Appends one line for each mode and concurrency to benchmarks/history/drafts.jsonl.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.support.draft_loads import (  # noqa: E402
    Asked,
    Forcing,
    Own,
    Turn,
    bounded,
    drive,
    own_turns,
    random_turns,
    recorded_turns,
)
from benchmarks.support.draft_pairs import measure_pairs  # noqa: E402
from tokenspeed import SamplingParams, __version__, loader  # noqa: E402
from tokenspeed.control import Scheduler  # noqa: E402
from tokenspeed.core.config import EngineConfig, SchedulerConfig  # noqa: E402
from tokenspeed.core.environment import let_threads_sleep  # noqa: E402
from tokenspeed.engine.core import Engine, EngineCore  # noqa: E402

HISTORY = Path(__file__).parent / "history" / "drafts.jsonl"
SESSIONS = ROOT.parent / "shared" / "workloads" / "coding_agent_sessions.jsonl"


@dataclass
class Run:
    """One way through a load."""

    turns: list[list[Turn]]
    took_s: float
    cpu_s: float
    drafted: int
    accepted: int

    @property
    def all_turns(self) -> list[Turn]:
        return [turn for of_user in self.turns for turn in of_user]

    def summary(self) -> dict[str, float]:
        """What is reported of it."""
        turns = self.all_turns
        tokens = sum(len(turn.tokens) for turn in turns)
        rates = [rate for turn in turns if (rate := turn.tokens_per_s) is not None]
        return {
            "turns": len(turns),
            "output_tokens": tokens,
            "took_s": self.took_s,
            "cpu_ms_per_token": 1e3 * self.cpu_s / max(1, tokens),
            "user_tokens_per_s": statistics.median(rates) if rates else 0.0,
            "tokens_per_minute": 60 * tokens / self.took_s,
            "tokens_per_step": tokens / max(1, sum(turn.steps for turn in turns)),
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
        }


class Bench:
    """One loaded model, run by a new control plane each time; `against` is the other side."""

    def __init__(self, engine: Engine, *, against: str) -> None:
        self._against = against
        self.tokenizer = loader.Tokenizer(Path(engine.info.tokenizer_dir))
        self.info = engine.info
        self._core = engine.core
        self._config: SchedulerConfig = engine.core.runner._config

    def run(
        self,
        users: list[Iterator[Asked]],
        *,
        drafts: bool,
        forced: bool,
        params: SamplingParams,
        answered: Callable[[int, Turn], None] = lambda user, turn: None,
    ) -> Run:
        """Take all users through their turns."""
        runner = Forcing(self._core.runner) if forced else self._core.runner
        core = self.core(runner, drafts=drafts)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        turns = drive(
            core,
            users,
            params=params,
            forcing=runner if isinstance(runner, Forcing) else None,
            answered=answered,
        )
        took_s = time.perf_counter() - began_s
        stats = core.control.stats()
        cpu_s = time.process_time() - began_cpu_s
        return Run(turns, took_s, cpu_s, stats.drafted_tokens, stats.accepted_tokens)

    def core(self, runner: Any, *, drafts: bool) -> EngineCore:
        """A new control plane over a runner, which knows what steps cost."""
        # Only now, because it imports torch.
        from tokenspeed.engine.pace import learn_drafts, learn_pace  # noqa: PLC0415

        config = self._config
        if not drafts:
            off = {"step_drafts_max": 0} if self._against == "off" else {}
            config = replace(config, step_proposals_max=0, proposal_length_max=0, **off)
        control = Scheduler(config)
        learn_pace(runner, config, control)
        if config.step_drafts_max:
            deque(learn_drafts(runner, config, control), maxlen=0)
        return EngineCore(
            control,
            runner,
            eos_token_ids=tuple(self.info.eos_token_ids),
            overlap_depth=config.overlap_depth,
            seed=0,
        )

    def forced(self, *, drafts: bool) -> tuple[EngineCore, Forcing]:
        """The same, and what forces its answers."""
        forcing = Forcing(self._core.runner)
        return self.core(forcing, drafts=drafts), forcing


def check(mode: str, runs: list[Run], wanted: list[list[Asked]] | None) -> None:
    """All runs gave the same answers, and the forced ones."""
    first = [[turn.tokens for turn in turns] for turns in runs[0].turns]
    for run in runs[1:]:
        if [[turn.tokens for turn in turns] for turns in run.turns] != first:
            raise SystemExit(f"{mode}: drafts changed an answer")
    if wanted is not None:
        forced = [[asked.answer for asked in asks] for asks in wanted]
        if any(found != given[: len(found)] for found, given in zip(first, forced, strict=True)):
            raise SystemExit(f"{mode}: an answer is not the forced one")


def ratios(on: list[Run], off: list[Run]) -> dict[str, Any]:
    """Of each turn, its best speed with drafts over its best without."""
    every: list[float] = []
    quoting: list[float] = []
    for of_turn in zip(*(run.all_turns for run in [*on, *off]), strict=True):
        rates = [turn.tokens_per_s for turn in of_turn]
        if any(rate is None for rate in rates):
            continue
        ratio = max(rates[: len(on)]) / max(rates[len(on) :])  # type: ignore[type-var, operator]
        every.append(ratio)
        if of_turn[0].quotes:
            quoting.append(ratio)
    return {
        "turns_timed": len(every),
        "ratio_median": statistics.median(every) if every else None,
        "turns_quoting": len(quoting),
        "ratio_quoting_median": statistics.median(quoting) if quoting else None,
    }


def measure(
    bench: Bench, options: argparse.Namespace, mode: str, concurrency: int
) -> tuple[list[Run], list[Run]]:
    """Runs with drafts and without, in turns."""
    context_max = min(options.context_max, bench.info.context_max)
    asks: list[list[Asked]] | None = None
    if mode == "recorded":
        found = recorded_turns(
            options.sessions_file,
            bench.tokenizer,
            sessions=options.sessions,
            turns=options.turns,
            context_max=context_max,
            output_max=options.output_tokens,
        )
        asks = [
            [asked for session in found[user::concurrency] for asked in session]
            for user in range(concurrency)
        ]
    sessions = []
    if asks is None:
        sessions = own_turns(
            options.sessions_file, bench.tokenizer, sessions=options.sessions, turns=options.turns
        )
    params = SamplingParams(temperature=options.temperature)
    on: list[Run] = []
    off: list[Run] = []
    counts: list[int] | None = None
    for index in range(2 * options.repeats):
        own = None
        if asks is None:
            own = Own(
                bench.tokenizer,
                sessions,
                concurrency,
                context_max=context_max,
                output_max=options.output_tokens,
            )
        users = [iter(turns) for turns in asks] if own is None else own.users
        ends_s = time.perf_counter() + 60 * options.minutes
        run = bench.run(
            bounded(users, ends_s, counts),
            drafts=index % 2 == 0,
            forced=asks is not None,
            params=params,
            **({} if own is None else {"answered": own.answered}),
        )
        counts = [len(turns) for turns in run.turns]
        (off if index % 2 else on).append(run)
    check(mode, [*on, *off], asks)
    return on, off


def random_text(bench: Bench, options: argparse.Namespace, concurrency: int) -> str:
    """Measure what looking for drafts costs where there are none; the verdict."""
    asks = random_turns(
        bench.info.vocab_size,
        users=concurrency,
        turns=options.turns,
        prompt_tokens=1024,
        output_tokens=options.output_tokens,
    )
    found = measure_pairs(lambda drafts: bench.forced(drafts=drafts), asks).summary()
    append(options, {"mode": "random", "concurrency": concurrency, **found})
    ranges = {
        name: f"{found[f'{name}_ratio']:.3f} ({found[f'{name}_ratio_low']:.3f} to "
        f"{found[f'{name}_ratio_high']:.3f})"
        for name in ("wall", "cpu")
    }
    return (
        f"random, {concurrency} users, {found['pairs']} pairs of steps, {found['drafted_tokens']} "
        f"tokens drafted: speed with drafts over that without {ranges['wall']}, by CPU time "
        f"{ranges['cpu']}"
    )


def append(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Add a line to the history, unless told not to."""
    if options.no_history:
        return
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "python": platform.python_version(),
        "model": options.model,
        "speculate": options.speculate,
        "against": options.against,
        "threads": options.threads,
        "kv_dtype": options.kv_dtype,
        "temperature": options.temperature,
        "output_tokens_max": options.output_tokens,
        "context_max": options.context_max,
        **found,
    }
    with HISTORY.open("a") as history:
        print(json.dumps(line), file=history)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--speculate", default="auto")
    parser.add_argument("--against", choices=["off", "suffix"], default="off")
    parser.add_argument("--sessions-file", type=Path, default=SESSIONS)
    parser.add_argument("--mode", nargs="*", default=["recorded", "own", "random"])
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6, help="of a session")
    parser.add_argument("--output-tokens", type=int, default=256, help="most of an answer")
    parser.add_argument("--context-max", type=int, default=16384)
    parser.add_argument("--minutes", type=float, default=4.0, help="of one run at most")
    parser.add_argument("--repeats", type=int, default=2, help="runs with drafts, and without")
    parser.add_argument("--temperature", type=float, default=0.0, help="of own answers")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-history", action="store_true", help="append nothing")
    options = parser.parse_args()
    unknown = set(options.mode) - {"recorded", "own", "random"}
    if unknown:
        parser.error(f"--mode {' '.join(sorted(unknown))}; there are recorded, own and random")
    let_threads_sleep()
    # Only now, because it imports torch.
    from tokenspeed.engine.build import build_engine  # noqa: PLC0415

    config = EngineConfig(
        model=options.model,
        threads=options.threads,
        kv_dtype=options.kv_dtype,
        max_running=max(options.concurrency),
        seed=0,
        speculate=options.speculate,
    )
    bench = Bench(build_engine(config), against=options.against)
    console = Console(width=150)
    columns = ("TPS of a user", "TPM", "CPU ms a token", "tokens a step", "accepted")
    table = Table("mode", "users", "drafts", *columns)
    verdicts = []
    for mode, concurrency in itertools.product(options.mode, options.concurrency):
        if mode == "random":
            verdicts.append(random_text(bench, options, concurrency))
            console.print(verdicts[-1])
            continue
        on, off = measure(bench, options, mode, concurrency)
        found = ratios(on, off)
        speed = max(run.summary()["tokens_per_minute"] for run in on) / max(
            run.summary()["tokens_per_minute"] for run in off
        )
        for name, runs in ((options.speculate, on), (options.against, off)):
            rows = [run.summary() for run in runs]
            table.add_row(
                mode,
                str(concurrency),
                name,
                " / ".join(f"{row['user_tokens_per_s']:.1f}" for row in rows),
                " / ".join(f"{row['tokens_per_minute']:.0f}" for row in rows),
                " / ".join(f"{row['cpu_ms_per_token']:.1f}" for row in rows),
                f"{rows[0]['tokens_per_step']:.2f}",
                f"{rows[0]['accepted_tokens']} of {rows[0]['drafted_tokens']}",
            )
        verdicts.append(
            f"{mode}, {concurrency} users, {found['turns_timed']} turns: TPS ratio "
            f"{_shown(found['ratio_median'])}, of {found['turns_quoting']} quoting turns "
            f"{_shown(found['ratio_quoting_median'])}, TPM ratio {speed:.3f}; answers equal"
        )
        console.print(verdicts[-1])
        append(
            options,
            {
                "mode": mode,
                "concurrency": concurrency,
                "tpm_ratio": speed,
                **found,
                "auto": [run.summary() for run in on],
                "off": [run.summary() for run in off],
            },
        )
    if table.row_count:
        console.print(table)


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


if __name__ == "__main__":
    main()
