"""Request traces in Mooncake's fields: read, checked line by line, and put in order of time.

A line is a JSON object: `timestamp` (milliseconds), `input_length`, `output_length` (tokens) and
`hash_ids`, which name the prompt's blocks of 512 tokens; equal ids are equal blocks. A prompt's
last, partial block may have an id or none. Agent traces add `session` and `turn`. The fields are
those of the Mooncake traces (Qin et al., FAST 2025).
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from tokenspeed.core.errors import WorkloadError

__all__ = ["BLOCK_TOKENS", "Trace", "TraceRequest", "read_trace"]

BLOCK_TOKENS = 512
TOKENS_MAX = 2**24  # Of one prompt or answer: far beyond any context, near enough to catch a slip.

_Count = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
_Length = Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)]


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    input_length: _Length
    output_length: _Length
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, le=2**62 - 1)]]
    session: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    turn: _Count | None = None
    # What the provider of a recorded session counted; its tokenizer is not the trace's.
    provider_prompt_tokens: _Count | None = None
    provider_completion_tokens: _Count | None = None
    provider_cached_tokens: _Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        sent_us: when it was sent, in microseconds from the trace's zero.
        input_tokens, output_tokens: of the prompt and of the answer.
        blocks: ids of the prompt's blocks of `BLOCK_TOKENS` tokens, its partial one last if it
            has an id.
        session: the conversation it belongs to, None if the trace does not say.
        turn: how many requests of its session came before it.
    """

    sent_us: int
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    session: str | None = None
    turn: int = 0

    @property
    def full_blocks(self) -> tuple[int, ...]:
        """Ids of the blocks that the prompt fills."""
        return self.blocks[: self.input_tokens // BLOCK_TOKENS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in order of `sent_us`; those of a session are in order of their turns."""

    name: str
    requests: tuple[TraceRequest, ...]

    @property
    def has_sessions(self) -> bool:
        """Whether any request names its session."""
        return any(request.session is not None for request in self.requests)


def read_trace(path: Path, *, limit: int | None = None) -> Trace:
    """Read a trace of JSON lines.

    Args:
        limit: take only the first so many lines.

    Raises:
        WorkloadError: no such file, nothing in it, or a line that is wrong; it names the line.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise WorkloadError(f"the trace {path} cannot be read: {error.strerror}") from error
    decoder = msgspec.json.Decoder(_Line)
    requests: list[TraceRequest] = []
    lines: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if limit is not None and len(requests) == limit:
            break
        if not line.strip():
            continue
        try:
            requests.append(_request(decoder.decode(line)))
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            raise WorkloadError(f"{path}, line {number}: {error}") from error
        lines.append(number)
    if not requests:
        raise WorkloadError(f"the trace {path} holds no request; a line is one JSON object")
    _check_turns(path, requests, lines)
    # Equal times keep the file's order.
    return Trace(name=path.stem, requests=tuple(sorted(requests, key=lambda entry: entry.sent_us)))


def _request(line: _Line) -> TraceRequest:
    blocks = line.input_length // BLOCK_TOKENS
    partial = line.input_length % BLOCK_TOKENS > 0
    if len(line.hash_ids) not in (blocks, blocks + partial):
        raise ValueError(
            f"{line.input_length} tokens have {blocks} full blocks of {BLOCK_TOKENS}"
            f"{' and a partial one' if partial else ''}, but there are {len(line.hash_ids)} "
            "hash_ids"
        )
    if line.turn is not None and line.session is None:
        raise ValueError("`turn` needs a `session`")
    return TraceRequest(
        sent_us=round(line.timestamp * 1000),
        input_tokens=line.input_length,
        output_tokens=line.output_length,
        blocks=tuple(line.hash_ids),
        session=line.session,
        turn=line.turn or 0,
    )


def _check_turns(path: Path, requests: list[TraceRequest], lines: list[int]) -> None:
    sessions: dict[str, list[tuple[TraceRequest, int]]] = defaultdict(list)
    for request, line in zip(requests, lines, strict=True):
        if request.session is not None:
            sessions[request.session].append((request, line))
    for name, turns in sessions.items():
        for (before, _), (after, line) in itertools.pairwise(turns):
            if after.turn <= before.turn or after.sent_us < before.sent_us:
                raise WorkloadError(
                    f"{path}, line {line}: turn {after.turn} of session {name!r} at "
                    f"{after.sent_us / 1000:g} ms comes after turn {before.turn} at "
                    f"{before.sent_us / 1000:g} ms; turns must ascend, and time with them"
                )
