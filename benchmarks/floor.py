"""Whether users who decode keep their floor while one long prompt arrives, and what that costs.

Some users decode on the real engine, in this process; then a prompt as long as the context holds
is submitted. From there until its first token every user's intervals between two tokens are taken.
Runs with the floor off and on in turn (A B A B). Printed: each user's p99 against the bound that
the engine promised, the prompt's time to its first token, and tokens a minute of prompt and users
together. Checked: every interval of every user was seen, and all greedy texts are the same with
the floor on as with it off as far as both go.

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
FLOOR_SHARE = 0.5
SETTLING_STEPS = 48
LONG = 1_000_000


@dataclass
class Watch:
    """Steps an engine and notes when each request got which token."""

    core: EngineCore
    times_s: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def submit(self, request: int, prompt: list[int], max_new_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        ids = np.array(prompt, dtype=np.int32).tobytes()
        self.core.submit(Submit(request, ids, params, max_new_tokens, 0, 0, 0, None))
        self.times_s[request], self.tokens[request] = [], []

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
            self.times_s[request].append(now_s)
            self.tokens[request].append(token)

    def intervals_ms(self, request: int, since_s: float) -> list[float]:
        """Between tokens that came after `since_s`, the one under way then included."""
        times_s = self.times_s[request]
        return [(b - a) * 1e3 for a, b in itertools.pairwise(times_s) if b > since_s]


def run(config: EngineConfig, users: int, prompt_tokens: int | None) -> dict[str, Any]:
    """One arrival of a long prompt, on a fresh engine."""
    # Imported late: torch reads how its threads wait when it is loaded.
    from tokenspeed.engine.build import build_engine  # noqa: PLC0415

    engine = build_engine(config)
    info, watch = engine.info, Watch(engine.core)
    rng = np.random.Generator(np.random.Philox(7))
    room = info.context_max - USER_PROMPT_TOKENS
    for user in range(users):
        watch.submit(user, rng.integers(100, 1000, USER_PROMPT_TOKENS).tolist(), room)
    while min(len(watch.times_s[user]) for user in range(users)) < SETTLING_STEPS:
        watch.step()
        if len(watch.times_s[0]) > 8 * SETTLING_STEPS:
            raise SystemExit(
                f"not all of {users} users got a place under the floor of {config.tps_floor} "
                "tokens/s: lower --tps-floor or --users, or wait until the machine is quiet"
            )
    alone_ms = statistics.median(watch.intervals_ms(0, watch.times_s[0][-SETTLING_STEPS // 2]))

    tokens = min(prompt_tokens or info.context_max, info.context_max) - 2
    watch.submit(LONG, rng.integers(100, 1000, tokens).tolist(), 1)
    began_s = time.perf_counter()
    before = sum(len(watch.tokens[user]) for user in range(users))
    while not watch.times_s[LONG]:
        watch.step()
    took_s = watch.times_s[LONG][-1] - began_s
    sampled = sum(len(watch.tokens[user]) for user in range(users)) - before
    context = USER_PROMPT_TOKENS + max(len(watch.tokens[user]) for user in range(users))
    bound_us = engine.core.control.interval_bound_us(context)
    intervals = [watch.intervals_ms(user, began_s) for user in range(users)]
    assert sum(map(len, intervals)) >= sampled - users
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
        "texts": [watch.tokens[user] for user in range(users)],
    }


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
    for _, found in runs[1:]:
        for a, b in zip(first, found["texts"], strict=True):
            shared = min(len(a), len(b))
            if a[:shared] != b[:shared]:
                console.print("a text differs between runs: rows are not bit-exact in this dtype")
                break
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
