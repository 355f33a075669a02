"""Whether users who decode keep their floor while one long prompt arrives, and what that costs.

Some users decode on the real engine, in this process, and ask again as soon as they are answered,
one after the other, for their answers differ in length. Each is a tenant of its own, so that none
waits for its turn behind the long prompt. Then a prompt as long as the context holds is submitted.
From there until its first token every user's intervals between two tokens of an answer are taken.
Runs with the floor off and on in turn (A B A B). Printed: each user's p99 against the bound that
the engine promised, the prompt's time to its first token, and tokens a minute of prompt and users
together. Checked: all answers to a user, which are greedy, are the same, with the floor on and
off.

Without --tps-floor the floor is a share of what so many users get with nobody else there: the
promise is about the machine at hand. Appends one line a run to benchmarks/history/floor.jsonl.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from tokenspeed import SamplingParams, __version__  # noqa: E402
from tokenspeed.core.config import EngineConfig  # noqa: E402
from tokenspeed.core.environment import let_threads_sleep  # noqa: E402
from tokenspeed.engine.core import EngineCore  # noqa: E402
from tokenspeed.engine.wire import Submit  # noqa: E402

USER_PROMPT_TOKENS = 128
# Of the first user, and how much more each further one is told.
ANSWER_TOKENS = 384
STAGGER_TOKENS = 32
FLOOR_SHARE = 0.5
SETTLING_STEPS = 48


def answer_tokens(user: int) -> int:
    """How long each answer to a user is."""
    return ANSWER_TOKENS + STAGGER_TOKENS * user


@dataclass
class Answer:
    """What came of one request, and when; `user` is None for the long prompt."""

    user: int | None
    times_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Watch:
    """Steps an engine, notes when each answer got which token, and lets users ask again."""

    def __init__(self, core: EngineCore, prompts: list[list[int]]) -> None:
        self.core = core
        self.prompts = prompts
        self.answers: list[Answer] = []
        for user in range(len(prompts)):
            self.ask(user)

    def ask(self, user: int) -> None:
        self.submit(self.prompts[user], answer_tokens(user), user=user)

    def submit(self, prompt: list[int], tokens: int, *, user: int | None) -> Answer:
        tenant = len(self.prompts) if user is None else user
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        ids = np.array(prompt, dtype=np.int32).tobytes()
        request = len(self.answers)
        self.core.submit(Submit(request, ids, params, tokens, 0, 0, 0, tenant))
        self.answers.append(Answer(user))
        return self.answers[-1]

    def step(self) -> None:
        outputs = self.core.step()
        now_s = time.perf_counter()
        if outputs is None:
            return
        for request, token in zip(
            np.frombuffer(outputs.requests, dtype=np.int64).tolist(),
            np.frombuffer(outputs.tokens, dtype=np.int32).tolist(),
            strict=True,
        ):
            answer = self.answers[request]
            answer.times_s.append(now_s)
            answer.tokens.append(token)
            if answer.user is not None and len(answer.tokens) == answer_tokens(answer.user):
                self.ask(answer.user)

    def of(self, user: int) -> list[Answer]:
        """A user's answers, in their order."""
        return [answer for answer in self.answers if answer.user == user]

    def sampled(self) -> int:
        """Tokens of all users so far."""
        return sum(len(answer.tokens) for answer in self.answers if answer.user is not None)

    def intervals_ms(self, user: int, since_s: float) -> list[float]:
        """Between tokens of an answer, if the later one came after `since_s`."""
        return [
            (b - a) * 1e3
            for answer in self.of(user)
            for a, b in itertools.pairwise(answer.times_s)
            if b > since_s
        ]


def run(config: EngineConfig, users: int, prompt_tokens: int | None) -> dict[str, Any]:
    """One arrival of a long prompt, on a fresh engine."""
    # Imported late: torch reads how its threads wait when it is loaded.
    from tokenspeed.engine.build import build_engine  # noqa: PLC0415

    engine = build_engine(config)
    info = engine.info
    rng = np.random.Generator(np.random.Philox(7))
    watch = Watch(
        engine.core,
        [rng.integers(100, 1000, USER_PROMPT_TOKENS).tolist() for _ in range(users)],
    )
    for _ in range(8 * SETTLING_STEPS):
        if all(len(watch.of(user)[0].times_s) >= SETTLING_STEPS for user in range(users)):
            break
        watch.step()
    else:
        raise SystemExit(
            f"not all of {users} users got a place under the floor of {config.tps_floor} "
            "tokens/s: lower --tps-floor or --users, or wait until the machine is quiet"
        )
    settled_s = watch.of(0)[0].times_s[-SETTLING_STEPS // 2]
    alone_ms = statistics.median(watch.intervals_ms(0, settled_s))

    tokens = min(prompt_tokens or info.context_max, info.context_max) - 2
    before = watch.sampled()
    long = watch.submit(rng.integers(100, 1000, tokens).tolist(), 1, user=None)
    began_s = time.perf_counter()
    while not long.times_s:
        watch.step()
    took_s = long.times_s[0] - began_s
    sampled = watch.sampled() - before
    bound_us = engine.core.control.interval_bound_us(USER_PROMPT_TOKENS + answer_tokens(users - 1))
    intervals = [watch.intervals_ms(user, began_s) for user in range(users)]
    engine.core.close()
    return {
        "p99_ms": [float(np.percentile(values, 99)) for values in intervals],
        "median_ms": [statistics.median(values) for values in intervals],
        "bound_ms": None if bound_us is None else bound_us / 1e3,
        "decode_step_ms": alone_ms,
        "prompt_tokens": tokens,
        "first_token_s": took_s,
        "tpm": (tokens + sampled) / took_s * 60,
        "user_tokens": sampled,
        "texts": [[answer.tokens for answer in watch.of(user)] for user in range(users)],
    }


def differ(a: list[list[int]], b: list[list[int]]) -> bool:
    """Whether any two answers of one user differ where both have a token."""
    return any(
        one != other
        for first, second in itertools.combinations([*a, *b], 2)
        for one, other in zip(first, second, strict=False)
    )


def main() -> None:
    """Measure, print and append to the history."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, help="[default: what the context holds]")
    parser.add_argument("--max-context", type=int)
    parser.add_argument("--tps-floor", type=float, help="[default: a share of the users' rate]")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    let_threads_sleep()
    console = Console()
    off = EngineConfig(
        model=arguments.model,
        max_context=arguments.max_context,
        max_running=arguments.users + 1,
        threads=arguments.threads,
        seed=0,
        speculate="off",
    )
    runs: list[tuple[float | None, dict[str, Any]]] = []
    floor = arguments.tps_floor
    for _ in range(arguments.repeats):
        runs.append((None, run(off, arguments.users, arguments.prompt_tokens)))
        if floor is None:
            floor = FLOOR_SHARE * 1e3 / runs[0][1]["decode_step_ms"]
        on = EngineConfig(
            **{
                name: getattr(off, name) for name in off.__dataclass_fields__ if name != "tps_floor"
            },
            tps_floor=floor,
        )
        runs.append((floor, run(on, arguments.users, arguments.prompt_tokens)))

    table = Table(
        "floor", "bound ms", "p99 ms of each user", "median ms", "first token s", "TPM",
        title=f"{arguments.users} users decode, {runs[0][1]['prompt_tokens']} prompt tokens arrive",
    )  # fmt: skip
    for rate, found in runs:
        table.add_row(
            "off" if rate is None else f"{rate:.1f} tokens/s",
            "-" if found["bound_ms"] is None else f"{found['bound_ms']:.1f}",
            " ".join(f"{value:.0f}" for value in found["p99_ms"]),
            f"{statistics.median(found['median_ms']):.1f}",
            f"{found['first_token_s']:.1f}",
            f"{found['tpm']:.0f}",
        )
    console.print(table)
    first = runs[0][1]["texts"]
    for _, found in runs:
        for a, b in zip(first, found["texts"], strict=True):
            assert not differ(a, b), "the same prompt was answered in two ways"
    tpm = {
        held: statistics.median(f["tpm"] for rate, f in runs if (rate is not None) == held)
        for held in (False, True)
    }
    kept = all(max(f["p99_ms"]) <= f["bound_ms"] for rate, f in runs if rate is not None)
    assert floor is not None
    broken = all(max(f["p99_ms"]) > 1e3 / floor for rate, f in runs if rate is None)
    console.print(
        f"floor on: every user's p99 under the bound: {'met' if kept else 'missed'}; "
        f"off: over 1/floor: {'yes' if broken else 'no'}; "
        f"cost in TPM: {1 - tpm[True] / tpm[False]:.1%}"
    )
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "configuration": {**vars(arguments), "user_prompt_tokens": USER_PROMPT_TOKENS},
        "floor": floor,
        "runs": [
            {"floor": rate, **{name: found[name] for name in found if name != "texts"}}
            for rate, found in runs
        ],
    }
    with (ROOT / "benchmarks" / "history" / "floor.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
