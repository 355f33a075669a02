"""Readers of session files; each line or document is checked, and an error names its place.

Three formats, told apart by their fields:

- `messages`: JSON lines of whole conversations in OpenAI's messages, with `tools` and, per turn,
  what the provider counted and how long the tool took (`meta.turns`).
- `abench`: JSON lines of the client agentic-bench (abench-session-jsonl-v1): `system_prompt` and
  turns with `input_delta`, `output_tokens` and `pre_gap_ms`.
- `swe_smith`: the JSON document of EvalScope's data set of that name: `conversations` of turns that
  hold only their new messages; answers' lengths and tools' times are not in it.

Mooncake traces are read as well; see `tokenspeed.bench.trace`.

Since the server's own answers are the history, a tool's result answers no call that the server
knows: it is sent as a user's message, and tool schemas as text at the end of the system prompt, so
that a prompt has its length and every server reads it alike.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from tokenspeed.bench.sessions.arrivals import trace_sessions
from tokenspeed.bench.sessions.model import Message, Session, Turn, Workload, estimate_tokens
from tokenspeed.bench.trace import read_trace
from tokenspeed.core.errors import WorkloadError

__all__ = ["FORMATS", "read_sessions"]

FORMATS = ("messages", "abench", "swe_smith", "mooncake")

_TOKENS_MAX = 2**24
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=_TOKENS_MAX)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
_Name = Annotated[str, msgspec.Meta(min_length=1)]


class _Call(msgspec.Struct):
    function: dict[str, Any]


class _RecordedMessage(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[_Call] | None = None


class _RecordedTurn(msgspec.Struct):
    completion_tokens: _Tokens | None = None
    tool_latency_s: _Seconds | None = None


class _Meta(msgspec.Struct):
    turns: list[_RecordedTurn] = []


class _MessagesLine(msgspec.Struct):
    id: _Name
    messages: Annotated[list[_RecordedMessage], msgspec.Meta(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    meta: _Meta | None = None


class _AbenchTurn(msgspec.Struct):
    input_delta: Annotated[list[_RecordedMessage], msgspec.Meta(min_length=1)]
    output_tokens: _Tokens = 0
    pre_gap_ms: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0


class _AbenchLine(msgspec.Struct):
    session_id: _Name
    turns: Annotated[list[_AbenchTurn], msgspec.Meta(min_length=1)]
    system_prompt: str = ""


class _SweSmithTurn(msgspec.Struct):
    messages: Annotated[list[_RecordedMessage], msgspec.Meta(min_length=1)]


class _SweSmithDocument(msgspec.Struct):
    conversations: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1)]


_LineT = TypeVar("_LineT", bound=msgspec.Struct)

_conversation = msgspec.json.Decoder(Annotated[list[_SweSmithTurn], msgspec.Meta(min_length=1)])


def read_sessions(path: Path, *, limit: int | None = None) -> Workload:
    """Read a file of sessions, in whichever of `FORMATS` it is.

    Args:
        limit: take only the first so many sessions, or requests of a trace.

    Raises:
        WorkloadError: no such file, nothing in it, or something wrong; it names file and line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkloadError(f"the sessions {path} cannot be read: {error.strerror}") from error
    first = next((line for line in data.splitlines() if line.strip()), None)
    if first is None:
        raise WorkloadError(f"{path}, line 1: the file is empty; formats are {', '.join(FORMATS)}")
    fields = _fields(first)
    if {"timestamp", "input_length"} <= fields:
        return trace_sessions(read_trace(path, limit=limit))
    if "messages" in fields:
        sessions = _lines(path, data, _MessagesLine, _from_messages)
    elif "session_id" in fields:
        sessions = _lines(path, data, _AbenchLine, _from_abench)
    elif "conversations" in fields or not fields:
        # A document may be indented, so that its first line alone is no JSON.
        sessions = _swe_smith(path, data)
    else:
        raise WorkloadError(
            f"{path}, line 1: no known format has the fields {', '.join(sorted(fields))}; "
            f"formats are {', '.join(FORMATS)}"
        )
    read = tuple(itertools.islice(sessions, limit))
    names: set[str] = set()
    for session in read:
        if session.name in names:
            raise WorkloadError(f"{path}: two sessions are named {session.name!r}")
        names.add(session.name)
    return Workload(source=path.name, sessions=read)


def _fields(line: bytes) -> set[str]:
    """Of the object that a line is; none where it is no object."""
    try:
        decoded = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return set()
    return set(decoded) if isinstance(decoded, dict) else {"no object"}


def _lines(
    path: Path, data: bytes, kind: type[_LineT], convert: Callable[[_LineT], Session]
) -> Iterator[Session]:
    decoder = msgspec.json.Decoder(kind)
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield convert(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            raise WorkloadError(f"{path}, line {number}: {error}") from error


def _from_messages(line: _MessagesLine) -> Session:
    recorded = line.meta.turns if line.meta is not None else []
    turns: list[Turn] = []
    waiting: list[Message] = []
    gap_s = 0.0
    for message in line.messages:
        if message.role != "assistant":
            waiting.append(_message(message))
            continue
        if not waiting:
            raise ValueError(f"answer {len(turns) + 1} follows an answer: nothing was asked")
        known = recorded[len(turns)] if len(turns) < len(recorded) else _RecordedTurn()
        if not turns:
            waiting = _with_tools(waiting, line.tools)
        turns.append(
            Turn.of(
                tuple(waiting),
                output_tokens=known.completion_tokens or _answer_tokens(message),
                gap_s=gap_s,
            )
        )
        waiting, gap_s = [], known.tool_latency_s or 0.0
    if not turns:
        raise ValueError("the conversation holds no message of the role `assistant`")
    return Session(name=line.id, turns=tuple(turns))


def _answer_tokens(message: _RecordedMessage) -> int:
    """Of an answer that nobody counted, by its text and its calls."""
    calls = [json.dumps(call.function) for call in message.tool_calls or []]
    return max(1, estimate_tokens(_text(message) + "".join(calls)))


def _with_tools(messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Message]:
    if not tools:
        return messages
    text = "\n\n# Tools\n\n" + "\n".join(json.dumps(tool) for tool in tools)
    if messages[0].role != "system":
        return [Message(role="system", content=text.strip()), *messages]
    system = Message(role="system", content=messages[0].content + text)
    return [system, *messages[1:]]


def _from_abench(line: _AbenchLine) -> Session:
    system = [Message(role="system", content=line.system_prompt)] if line.system_prompt else []
    return Session(
        name=line.session_id,
        turns=tuple(
            Turn.of(
                (
                    *(system if number == 0 else ()),
                    *(_message(message) for message in turn.input_delta),
                ),
                output_tokens=turn.output_tokens or None,
                gap_s=turn.pre_gap_ms / 1000,
            )
            for number, turn in enumerate(line.turns)
        ),
    )


def _swe_smith(path: Path, data: bytes) -> Iterator[Session]:
    try:
        document = msgspec.json.decode(data, type=_SweSmithDocument)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}, line {_line_of(data, error)}: {error}") from error
    at = 0
    for number, raw in enumerate(document.conversations):
        at = data.index(bytes(raw), at)
        try:
            turns = _conversation.decode(raw)
            yield Session(
                name=f"conversation {number}",
                turns=tuple(
                    Turn.of(
                        tuple(_message(message) for message in turn.messages), output_tokens=None
                    )
                    for turn in turns
                ),
            )
        except (msgspec.DecodeError, ValueError) as error:
            line = data.count(b"\n", 0, at) + 1
            raise WorkloadError(f"{path}, line {line}, conversation {number}: {error}") from error
        at += len(bytes(raw))


def _line_of(data: bytes, error: Exception) -> int:
    """The line of the byte that a decoder's error names; of the first one, if it names none."""
    match = re.search(r"byte (\d+)", str(error))
    return 1 if match is None else data.count(b"\n", 0, int(match.group(1))) + 1


def _message(message: _RecordedMessage) -> Message:
    if message.role not in ("system", "user", "tool"):
        raise ValueError(f"the role {message.role!r} is none of system, user and tool")
    return Message(role="system" if message.role == "system" else "user", content=_text(message))


def _text(message: _RecordedMessage) -> str:
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    parts = [part.get("text") for part in message.content]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a part of a message's content is no text")
    return "\n".join(map(str, parts))
