"""Sessions drawn from published statistics of coding agents; equal seeds, equal sessions.

The statistics are those of recorded software-engineering agents (mini-SWE-agent, SWE-agent) on
repositories of Python: prompts, new tokens, answers and tools' times by their quantiles.
"""

import itertools
import math
import random
from dataclasses import dataclass

from tokenspeed.bench.sessions.model import Message, Session, Turn, Workload
from tokenspeed.bench.sessions.words import words
from tokenspeed.core.errors import ConfigError

__all__ = ["SWE", "Profile", "generate_sessions"]

Quantiles = tuple[tuple[float, float], ...]
"""(part of all, value) in ascending order, from the least (part 0) to the greatest (part 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What sessions look like; values between two quantiles are drawn evenly in their logarithm.

    Attributes:
        system_tokens: of the system prompt that all sessions share, within `first_tokens`.
        first_tokens: of the first prompt.
        turns: of a session that the context does not end.
        new_tokens: of every later request, beside what is history.
        output_tokens: of an answer.
        tool_s: of a tool, between an answer and the next request.
        context_max: tokens at which a session ends.
    """

    system_tokens: int
    first_tokens: Quantiles
    turns: Quantiles
    new_tokens: Quantiles
    output_tokens: Quantiles
    tool_s: Quantiles
    context_max: int


SWE = Profile(
    system_tokens=900,
    first_tokens=((0.0, 1500), (0.5, 2000), (0.9, 3500), (1.0, 5000)),
    turns=((0.0, 12), (0.5, 45), (1.0, 90)),
    new_tokens=((0.0, 20), (0.5, 120), (0.9, 720), (0.99, 2000), (1.0, 4000)),
    output_tokens=((0.0, 16), (0.5, 65), (0.9, 560), (0.99, 1500), (1.0, 3000)),
    tool_s=((0.0, 0.05), (0.5, 0.26), (0.9, 0.5), (0.99, 10.0), (1.0, 60.0)),
    context_max=70_000,
)


def generate_sessions(profile: Profile, *, count: int, seed: int) -> Workload:
    """Draw sessions. A session does not depend on how many are drawn.

    Raises:
        ConfigError: `count` is below 1.
    """
    if count < 1:
        raise ConfigError(f"--sessions-max must be at least 1, but is {count}")
    system = Message(role="system", content=words(f"system {seed}", profile.system_tokens))
    return Workload(
        source=f"synthetic, seed {seed}",
        sessions=tuple(_session(profile, system, number, seed) for number in range(count)),
    )


def _session(profile: Profile, system: Message, number: int, seed: int) -> Session:
    name = f"synthetic {seed}-{number}"
    draw = random.Random(name)  # noqa: S311
    turns: list[Turn] = []
    context = 0
    for index in range(_count(draw, profile.turns)):
        if index == 0:
            new = _count(draw, profile.first_tokens) - profile.system_tokens
            context = profile.system_tokens
            gap_s = 0.0
        else:
            new = _count(draw, profile.new_tokens)
            gap_s = _value(draw, profile.tool_s)
        output = _count(draw, profile.output_tokens)
        context += new + output
        if context > profile.context_max:
            break
        asked = Message(role="user", content=words(f"{name} {index}", new))
        turns.append(
            Turn(
                messages=(system, asked) if index == 0 else (asked,),
                new_tokens=new + (profile.system_tokens if index == 0 else 0),
                output_tokens=output,
                gap_s=gap_s,
            )
        )
    return Session(name=name, turns=tuple(turns))


def _count(draw: random.Random, quantiles: Quantiles) -> int:
    return round(_value(draw, quantiles))


def _value(draw: random.Random, quantiles: Quantiles) -> float:
    part = draw.random()
    for (low_part, low), (high_part, high) in itertools.pairwise(quantiles):
        if part <= high_part:
            share = (part - low_part) / (high_part - low_part)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return quantiles[-1][1]
