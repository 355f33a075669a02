"""What a replay sends: sessions of turns, whatever file or draw they came from."""

import dataclasses
import math
from dataclasses import dataclass

from tokenspeed.core.errors import ConfigError

__all__ = [
    "CHARACTERS_PER_TOKEN",
    "Message",
    "Session",
    "Turn",
    "Workload",
    "cut",
    "estimate_tokens",
]

# Of code, English and tool output with the tokenizers of today's models: 3.39 in the recorded
# sessions that this was taken from.
CHARACTERS_PER_TOKEN = 3.4
# What a chat template puts around a message.
_MESSAGE_TOKENS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message that the client writes: `role` is "system" or "user"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request, without the history that comes before it.

    Attributes:
        messages: what is new since the last answer.
        new_tokens: about how many tokens they are.
        output_tokens: how long the recorded answer was; None where the file does not say.
        gap_s: the tool's time between the last answer and this request.
    """

    messages: tuple[Message, ...]
    new_tokens: int
    output_tokens: int | None
    gap_s: float = 0.0

    @staticmethod
    def of(
        messages: tuple[Message, ...], *, output_tokens: int | None, gap_s: float = 0.0
    ) -> "Turn":
        """A turn whose new tokens nobody counted: by the length of its text."""
        return Turn(
            messages=messages,
            new_tokens=sum(estimate_tokens(message.content) for message in messages),
            output_tokens=output_tokens,
            gap_s=gap_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One conversation.

    Attributes:
        name: unique within its workload.
        start_s: when its first turn is sent in an open loop; None where the workload does not say.
    """

    name: str
    turns: tuple[Turn, ...]
    start_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sessions in the order in which users take them up; `source` says where they are from."""

    source: str
    sessions: tuple[Session, ...]

    @property
    def turns(self) -> int:
        """Turns of all sessions."""
        return sum(len(session.turns) for session in self.sessions)

    @property
    def has_arrivals(self) -> bool:
        """Whether each session says when it begins."""
        return all(session.start_s is not None for session in self.sessions)


def estimate_tokens(text: str) -> int:
    """About how many tokens a text is, for any tokenizer."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def cut(
    workload: Workload,
    *,
    sessions_max: int | None = None,
    turns_max: int | None = None,
    context_max: int | None = None,
    output_tokens: int | None = None,
    gap_scale: float = 1.0,
    gap_max_s: float | None = None,
) -> Workload:
    """The workload that is asked for, the same for every server.

    Args:
        sessions_max: take only the first so many sessions.
        turns_max: take only the first so many turns of each.
        context_max: leave out the turn, and all after it, whose prompt and answer would be longer,
            as far as the workload tells; a session that has none left is left out.
        output_tokens: length of every answer, in place of the recorded one.
        gap_scale: factor on the tools' times; 0 removes them.
        gap_max_s: the longest time that a tool takes, after scaling.

    Raises:
        ConfigError: an answer's length is neither recorded nor given, or nothing is left.
    """
    kept = []
    for session in workload.sessions[:sessions_max]:
        turns = []
        context = 0
        for turn in session.turns[:turns_max]:
            tokens = turn.output_tokens if output_tokens is None else output_tokens
            if tokens is None:
                raise ConfigError(
                    f"{workload.source} does not say how long answers were (session "
                    f"{session.name!r}); give their length with --output-tokens"
                )
            context += turn.new_tokens + tokens + _MESSAGE_TOKENS * (len(turn.messages) + 1)
            if context_max is not None and context > context_max:
                break
            gap_s = turn.gap_s * gap_scale
            gap_s = gap_s if gap_max_s is None else min(gap_s, gap_max_s)
            turns.append(dataclasses.replace(turn, output_tokens=tokens, gap_s=gap_s))
        if turns:
            kept.append(dataclasses.replace(session, turns=tuple(turns)))
    if not kept:
        raise ConfigError(
            f"no turn of {workload.source} is left: --max-context {context_max} is less than each "
            "first prompt and its answer"
        )
    return dataclasses.replace(workload, sessions=tuple(kept))
