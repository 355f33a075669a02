"""Experiments on synthetic load: what the floor is worth, and what a pool too small costs."""

import dataclasses
from dataclasses import dataclass

import msgspec
import numpy as np

from tokenspeed.bench.config import SimulationConfig
from tokenspeed.bench.hardware import StepTime
from tokenspeed.bench.replay import simulate
from tokenspeed.bench.report import Report, summarise
from tokenspeed.bench.trace import BLOCK_TOKENS, Trace, TraceRequest
from tokenspeed.core.config import CacheGroup
from tokenspeed.core.errors import ConfigError
from tokenspeed.core.step import Int64Array, StepWork

__all__ = ["FloorExperiment", "FloorRun", "Oversubscription", "floor", "oversubscription"]

# Of the floor's experiment.
_USERS = 8
_USER_PROMPT_TOKENS = 8192
_USER_ANSWER_TOKENS = 4000
_LONG_PROMPT_TOKENS = 65_536
_SETTLING_STEPS = 200

# Of the oversubscription's requests, in tokens. Answers as long as prompts: what a request needs
# more than doubles after its admission, which is where a scheduler that promised too much fails.
_PROMPT_TOKENS = (1500, 4500)
_ANSWER_TOKENS = (1000, 4000)
_REQUESTS_PER_USER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FloorRun:
    """What the users got from the arrival of the long prompt to its first token.

    Attributes:
        tps_floor: the floor held, None without one.
        user_p99_ms: 99 of 100 times between two tokens of each user were no longer.
        interval_max_ms: the longest of all users.
        ttft_s: what the long prompt waited for its first token.
        window_tpm: tokens a minute meanwhile, the long prompt's and the users' together.
        total_tpm: prompt and answer tokens a minute of the whole run.
    """

    tps_floor: float | None
    user_p99_ms: tuple[float, ...]
    interval_max_ms: float
    ttft_s: float
    window_tpm: float
    total_tpm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FloorExperiment:
    """Users decode while one long prompt arrives, with the floor and without.

    Attributes:
        bound_ms: the time between two tokens at the floor.
        kept: every user's p99 is within the bound with the floor held.
        broken_without: some user's p99 is not, without.
        window_cost, total_cost: the part of the tokens a minute that the floor takes.
    """

    tps_floor: float
    bound_ms: float
    held: FloorRun
    off: FloorRun
    kept: bool
    broken_without: bool
    window_cost: float
    total_cost: float

    def to_json(self) -> bytes:
        """The experiment as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def floor(config: SimulationConfig, *, tps_floor: float) -> FloorExperiment:
    """Run the experiment on one replica.

    Raises:
        ConfigError: the long prompt does not fit beside the users.
    """
    scheduler = config.scheduler
    longest = _LONG_PROMPT_TOKENS + 1
    total = longest + _USERS * (_USER_PROMPT_TOKENS + _USER_ANSWER_TOKENS)
    pool = scheduler.groups[0].pages * scheduler.page_size
    if scheduler.context_max < longest or pool < total:
        raise ConfigError(
            f"the experiment needs --max-context {longest} and --kv-tokens {total} at least, but "
            f"has {scheduler.context_max} and {pool}"
        )
    held = _floor_run(config, tps_floor)
    off = _floor_run(config, None)
    bound_ms = 1e3 / tps_floor
    return FloorExperiment(
        tps_floor=tps_floor,
        bound_ms=bound_ms,
        held=held,
        off=off,
        kept=max(held.user_p99_ms) <= bound_ms,
        broken_without=max(off.user_p99_ms) > bound_ms,
        window_cost=1 - held.window_tpm / off.window_tpm,
        total_cost=1 - held.total_tpm / off.total_tpm,
    )


def _floor_run(config: SimulationConfig, tps_floor: float | None) -> FloorRun:
    trace = _users_and_a_prompt(config.step_time)
    changed = dataclasses.replace(
        config,
        loop="open",
        replicas=1,
        scale=1,
        speed=1.0,
        scheduler=dataclasses.replace(config.scheduler, tps_floor=tps_floor),
    )
    times_us: list[list[int]] = [[] for _ in trace.requests]

    def watch(requests: Int64Array, now_us: int) -> None:
        for request in requests.tolist():
            times_us[request].append(now_us)

    results = simulate(trace, changed, watch=watch)
    summary = summarise(
        results, changed, trace_name=trace.name, devices_per_replica=1, baselines=None
    )
    # The prompt was sent last.
    arrived_us, first_us = trace.requests[-1].sent_us, times_us[-1][0]
    p99_ms, interval_max_us, seen = [], 0, 0
    for times in times_us[:-1]:
        at_us = np.array(times)
        intervals_us = np.diff(at_us)
        within = (at_us[1:] > arrived_us) & (at_us[:-1] < first_us)
        p99_ms.append(float(np.percentile(intervals_us[within], 99, method="higher")) / 1e3)
        interval_max_us = max(interval_max_us, int(intervals_us[within].max()))
        seen += int(within.sum())
    return FloorRun(
        tps_floor=tps_floor,
        user_p99_ms=tuple(p99_ms),
        interval_max_ms=interval_max_us / 1e3,
        ttft_s=(first_us - arrived_us) / 1e6,
        window_tpm=(_LONG_PROMPT_TOKENS + seen) * 6e7 / (first_us - arrived_us),
        total_tpm=summary.total_tpm,
    )


def _users_and_a_prompt(step_time: StepTime) -> Trace:
    """Users, and the long prompt once all of them decode."""
    prompt = StepWork(prefill_tokens=_USER_PROMPT_TOKENS, prefill_pairs=_USER_PROMPT_TOKENS**2 / 2)
    decode = StepWork(decode_rows=_USERS, context_tokens=_USERS * _USER_PROMPT_TOKENS)
    # Twice what the prompts take, since a floor makes them wait for each other.
    settled_us = 2 * _USERS * step_time.predict_us(prompt)
    settled_us += _SETTLING_STEPS * step_time.predict_us(decode)
    users = [
        TraceRequest(
            sent_us=0,
            input_tokens=_USER_PROMPT_TOKENS,
            output_tokens=_USER_ANSWER_TOKENS,
            blocks=_fresh_blocks(user, _USER_PROMPT_TOKENS),
        )
        for user in range(_USERS)
    ]
    long = TraceRequest(
        sent_us=round(settled_us),
        input_tokens=_LONG_PROMPT_TOKENS,
        output_tokens=1,
        blocks=_fresh_blocks(_USERS, _LONG_PROMPT_TOKENS),
    )
    return Trace(name="floor", requests=(*users, long))


def _fresh_blocks(owner: int, tokens: int) -> tuple[int, ...]:
    first = owner * 1_000_000
    return tuple(range(first, first + -(-tokens // BLOCK_TOKENS)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Oversubscription:
    """Users who together need twice the pages of the pool, beside two runs to compare with.

    Attributes:
        users: who each send one request after the other.
        crowded: all users, on the pool.
        half: half the users, who fit the pool.
        roomy: all users, on a pool twice as large.
        of_half, of_roomy: output tokens a minute of `crowded` as a part of the others'.
    """

    users: int
    crowded: Report
    half: Report
    roomy: Report
    of_half: float
    of_roomy: float

    def to_json(self) -> bytes:
        """The experiment as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def oversubscription(config: SimulationConfig, *, devices_per_replica: int) -> Oversubscription:
    """Run the experiment on one replica; requests of a user follow each other without a pause.

    Raises:
        ConfigError: the pool holds too little to tell anything.
        EngineError: the control plane came to rest with requests unfinished.
    """
    scheduler = config.scheduler
    mean_tokens = sum(_PROMPT_TOKENS) / 2 + sum(_ANSWER_TOKENS) / 4
    fitting = int(scheduler.groups[0].pages * scheduler.page_size / mean_tokens)
    if fitting < 4:
        raise ConfigError(
            f"the pool of {scheduler.groups[0].pages * scheduler.page_size} tokens "
            f"holds {fitting} requests "
            f"of this experiment; give it room for 4, --kv-tokens {int(4.5 * mean_tokens)}"
        )
    users = 2 * fitting

    def run(active: int, pages: int) -> Report:
        trace = _answers_of(active, seed=config.seed)
        changed = dataclasses.replace(
            config,
            loop="closed",
            tool_gap_ms=0.0,
            replicas=1,
            scale=1,
            speed=1.0,
            scheduler=dataclasses.replace(
                scheduler,
                groups=(CacheGroup(pages=pages),),
                slots_max=users,
                step_tokens_max=max(users, scheduler.step_tokens_max),
                # A floor would keep users out before the pages do.
                tps_floor=None,
                queue_timeout_us=None,
            ),
        )
        return summarise(
            simulate(trace, changed),
            changed,
            trace_name=trace.name,
            devices_per_replica=devices_per_replica,
            baselines=None,
        )

    crowded = run(users, scheduler.groups[0].pages)
    half = run(fitting, scheduler.groups[0].pages)
    roomy = run(users, 2 * scheduler.groups[0].pages)
    return Oversubscription(
        users=users,
        crowded=crowded,
        half=half,
        roomy=roomy,
        of_half=crowded.output_tpm / half.output_tpm,
        of_roomy=crowded.output_tpm / roomy.output_tpm,
    )


def _answers_of(users: int, *, seed: int) -> Trace:
    """Requests that share nothing, as many for each user, long prompts and long answers."""
    rng = np.random.Generator(np.random.Philox(seed))
    requests = []
    block = 0
    for turn in range(_REQUESTS_PER_USER):
        for user in range(users):
            prompt = int(rng.integers(*_PROMPT_TOKENS, endpoint=True))
            blocks = -(-prompt // BLOCK_TOKENS)
            requests.append(
                TraceRequest(
                    sent_us=turn,
                    input_tokens=prompt,
                    output_tokens=int(rng.integers(*_ANSWER_TOKENS, endpoint=True)),
                    blocks=tuple(range(block, block + blocks)),
                    session=f"user {user}",
                    turn=turn,
                )
            )
            block += blocks
    return Trace(name="oversubscription", requests=tuple(requests))
