"""Two experiments on synthetic load: what a pool too small costs, and what the floor is worth."""

import dataclasses
from dataclasses import dataclass

import msgspec
import numpy as np

from tokenspeed.bench.config import SimulationConfig
from tokenspeed.bench.replay import simulate
from tokenspeed.bench.report import Report, summarise
from tokenspeed.bench.trace import BLOCK_TOKENS, Trace, TraceRequest
from tokenspeed.core.config import CacheGroup
from tokenspeed.core.errors import ConfigError

__all__ = ["Oversubscription", "oversubscription"]

# Of the oversubscription's requests, in tokens. Answers as long as prompts: what a request needs
# more than doubles after its admission, which is where a scheduler that promised too much fails.
_PROMPT_TOKENS = (1500, 4500)
_ANSWER_TOKENS = (1000, 4000)
_REQUESTS_PER_USER = 4


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
