"""Requests shaped as coding agents send them, written from the public API references.

Each is small; what matters is which fields, blocks and items it has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["AgentRequest", "agent_requests"]

EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
READ_SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "file_path": {"type": "string", "description": "Absolute path"},
        "limit": {"type": "number"},
    },
    "required": ["file_path"],
    "additionalProperties": False,
}
EDIT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "file_path": {"type": "string"},
        "edits": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "old_string": {"type": "string"},
                    "new_string": {"type": "string"},
                    "replace_all": {"type": "boolean", "default": False},
                },
                "required": ["old_string", "new_string"],
            },
        },
    },
    "required": ["file_path", "edits"],
}


@dataclass(frozen=True, kw_only=True)
class AgentRequest:
    """One request.

    Attributes:
        name: of the shape.
        path: of the endpoint, with its query.
        headers: beside content type and key.
        body: without model and stream.
        streamed: whether it can be streamed.
    """

    name: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    streamed: bool = True


def agent_requests() -> list[AgentRequest]:
    """All shapes."""
    return [*_messages(), *_responses(), *_chat()]


# --- Anthropic's Messages, as Claude Code speaks it

_CLAUDE_HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,"
    "fine-grained-tool-streaming-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "x-app": "cli",
    "x-stainless-lang": "js",
    "x-stainless-retry-count": "0",
    "user-agent": "agent-cli/1.0 (external, cli)",
}
_CLAUDE_SYSTEM = [
    {"type": "text", "text": "You are a coding agent.", **EPHEMERAL},
    {
        "type": "text",
        "text": "Work in small steps.\n<env>platform: linux</env>",
        "cache_control": {"type": "ephemeral", "ttl": "1h"},
    },
]
_CLAUDE_TOOLS = [
    {"name": "Read", "description": "Reads a file.", "input_schema": READ_SCHEMA},
    {"type": "custom", "name": "MultiEdit", "description": "", "input_schema": EDIT_SCHEMA},
    {
        "name": "TodoWrite",
        "description": "Keeps a list.",
        "input_schema": {
            "type": "object",
            "properties": {
                "todos": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "content": {"type": "string", "minLength": 1},
                            "status": {"type": "string", "enum": ["pending", "done"]},
                        },
                        "required": ["content", "status"],
                    },
                }
            },
        },
        **EPHEMERAL,
    },
]
_CLAUDE_USER = {
    "role": "user",
    "content": [
        {"type": "text", "text": "<system-reminder>Be brief.</system-reminder>"},
        {"type": "text", "text": "Mend a.py.", **EPHEMERAL},
    ],
}


def _claude(name: str, **fields: Any) -> AgentRequest:
    headers = fields.pop("headers", _CLAUDE_HEADERS)
    path = fields.pop("path", "/v1/messages?beta=true")
    streamed = fields.pop("streamed", True)
    body = {
        "max_tokens": 8,
        "system": _CLAUDE_SYSTEM,
        "tools": _CLAUDE_TOOLS,
        "messages": [_CLAUDE_USER],
        "metadata": {"user_id": "user_0a1b_account__session_2c3d"},
        "temperature": 1,
    }
    dropped = [key for key, value in fields.items() if value is None]
    body = {key: value for key, value in (body | fields).items() if key not in dropped}
    return AgentRequest(
        name=f"messages: {name}", path=path, headers=headers, body=body, streamed=streamed
    )


def _use(number: int, name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{number:02}", "name": name, "input": arguments}


def _result(number: int, content: Any = None, **fields: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": f"toolu_{number:02}"}
    return result | ({} if content is None else {"content": content}) | fields


def _messages() -> Iterator[AgentRequest]:
    yield _claude("first turn")
    yield _claude("system as a string", system="You are a coding agent.")
    yield _claude("no system, no tools, no metadata", system=None, tools=None, metadata=None)
    yield _claude("content as a string", messages=[{"role": "user", "content": "Hello."}])
    yield _claude("plain headers", headers={"anthropic-version": "2023-06-01"})
    yield _claude("path without query", path="/v1/messages")
    called: list[dict[str, Any]] = [
        _CLAUDE_USER,
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "I read both."},
                _use(1, "Read", file_path="/a.py"),
                _use(2, "Read", file_path="/b.py", limit=10),
            ],
        },
        {
            "role": "user",
            "content": [
                _result(1, "1\tprint(1)"),
                _result(2, [{"type": "text", "text": "no such file"}], is_error=True, **EPHEMERAL),
                {"type": "text", "text": "<system-reminder>Keep the list.</system-reminder>"},
            ],
        },
    ]
    yield _claude("parallel calls and their results", messages=called)
    yield _claude(
        "an empty result and a second turn",
        messages=[
            *called,
            {"role": "assistant", "content": [_use(3, "TodoWrite", todos=[])]},
            {"role": "user", "content": [_result(3)]},
            {"role": "assistant", "content": "Done."},
            {"role": "user", "content": "Go on."},
        ],
    )
    yield _claude(
        "interleaved thinking",
        thinking={"type": "enabled", "budget_tokens": 1024},
        max_tokens=1032,
        messages=[
            _CLAUDE_USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "First a.py.", "signature": "c2ln"},
                    {"type": "redacted_thinking", "data": "ZGF0YQ=="},
                    _use(1, "Read", file_path="/a.py"),
                ],
            },
            {"role": "user", "content": [_result(1, "print(1)")]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Now the edit.", "signature": "c2ln"},
                    _use(2, "MultiEdit", file_path="/a.py", edits=[]),
                ],
            },
            {"role": "user", "content": [_result(2, "ok")]},
        ],
    )
    yield _claude("thinking off", thinking={"type": "disabled"})
    yield _claude("thinking adaptive", thinking={"type": "adaptive"})
    for choice in (
        {"type": "auto"},
        {"type": "auto", "disable_parallel_tool_use": True},
        {"type": "any"},
        {"type": "tool", "name": "Read"},
        {"type": "none"},
    ):
        yield _claude(f"tool choice {choice}", tool_choice=choice)
    yield _claude("stops, top_k, top_p", stop_sequences=["\n\nHuman:"], top_k=40, top_p=0.9)
    yield _claude("service tier", service_tier="auto")
    yield _claude(
        "context management",
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
    )
    yield _claude("effort", output_config={"effort": "medium"})
    yield _claude(
        "an assistant's beginning",
        messages=[_CLAUDE_USER, {"role": "assistant", "content": "{"}],
    )
    yield _claude(
        "two user turns in a row", messages=[_CLAUDE_USER, {"role": "user", "content": "Now."}]
    )
    yield _claude(
        "counting",
        path="/v1/messages/count_tokens?beta=true",
        streamed=False,
        max_tokens=None,
        temperature=None,
        metadata=None,
    )


# --- OpenAI's Responses, as Codex speaks it

_CODEX_HEADERS = {
    "openai-beta": "responses=experimental",
    "originator": "agent_cli",
    "session_id": "0199a213-81c0-7800-8aa1-bbab2a035a53",
    "conversation_id": "0199a213-81c0-7800-8aa1-bbab2a035a53",
    "user-agent": "agent_cli/1.0 (Linux; x86_64)",
}
_SHELL = {
    "type": "function",
    "name": "shell",
    "description": "Runs a command.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}},
            "workdir": {"type": "string"},
            "timeout_ms": {"type": "number"},
        },
        "required": ["command"],
        "additionalProperties": False,
    },
}
_PLAN = {
    "type": "function",
    "name": "update_plan",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"explanation": {"type": ["string", "null"]}},
        "required": ["explanation"],
        "additionalProperties": False,
    },
}
_AGENTS = {
    "type": "namespace",
    "name": "agents",
    "description": "Agents beside this one.",
    "tools": [_PLAN],
}
_PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {
        "type": "grammar",
        "syntax": "lark",
        "definition": 'start: "*** Begin Patch" LF "*** End Patch" LF?\n%import common.LF',
    },
}


def _input(role: str, text: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def _codex(name: str, **fields: Any) -> AgentRequest:
    body = {
        "instructions": "You are a coding agent.",
        "input": [
            _input("developer", "<permissions>read only</permissions>"),
            _input("user", "<environment_context>cwd: /</environment_context>"),
            _input("user", "Mend a.py."),
        ],
        "tools": [_SHELL, _PLAN],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199a213-81c0-7800-8aa1-bbab2a035a53",
        "client_metadata": {"x-codex-installation-id": "0199a213-81c0-7800-8aa1-bbab2a035a54"},
        "max_output_tokens": 16,
    }
    dropped = [key for key, value in fields.items() if value is None]
    body = {key: value for key, value in (body | fields).items() if key not in dropped}
    return AgentRequest(
        name=f"responses: {name}", path="/v1/responses", headers=_CODEX_HEADERS, body=body
    )


def _responses() -> Iterator[AgentRequest]:
    yield _codex("first turn")
    yield _codex("input as a string", input="Mend a.py.")
    yield _codex("no reasoning", reasoning=None, include=None)
    yield _codex("include nothing", include=[])
    yield _codex("a message without its type", input=[{"role": "user", "content": "Hello."}])
    history = [
        _input("user", "Mend a.py."),
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "Read it first."}],
            "encrypted_content": "ZGF0YQ==",
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "call_1",
            "name": "shell",
            "arguments": '{"command":["cat","a.py"]}',
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "call_1", "output": '{"output":"print(1)"}'},
    ]
    yield _codex("a call, its output, reasoning", input=history)
    for name, item in {
        "reasoning without content": {"id": "rs_1", "summary": []},
        "reasoning without id": {"summary": [], "encrypted_content": "ZGF0YQ=="},
        "reasoning whose content is null": {"id": "rs_1", "summary": [], "content": None},
    }.items():
        yield _codex(name, input=[history[0], {"type": "reasoning", **item}, *history[2:]])
    yield _codex(
        "a search in the history",
        input=[
            history[0],
            {
                "type": "web_search_call",
                "id": "ws_1",
                "status": "completed",
                "action": {"type": "search", "query": "a"},
            },
        ],
    )
    yield _codex(
        "parallel calls",
        parallel_tool_calls=True,
        input=[
            history[0],
            *({**history[2], "id": f"fc_{n}", "call_id": f"call_{n}"} for n in (1, 2)),
            *({**history[3], "call_id": f"call_{n}"} for n in (1, 2)),
            _input("assistant", "Both are read."),
            _input("user", "Go on."),
        ],
    )
    yield _codex(
        "an output of parts",
        input=[
            *history[:3],
            {
                "type": "function_call_output",
                "call_id": "call_1",
                "output": [{"type": "input_text", "text": "print(1)"}],
            },
        ],
    )
    yield _codex("custom tool", tools=[_SHELL, _PATCH])
    yield _codex(
        "custom tool's call and output",
        tools=[_SHELL, _PATCH],
        input=[
            history[0],
            {
                "type": "custom_tool_call",
                "id": "ctc_1",
                "call_id": "call_1",
                "name": "apply_patch",
                "input": "*** Begin Patch\n*** End Patch",
                "status": "completed",
            },
            {"type": "custom_tool_call_output", "call_id": "call_1", "output": "Done"},
        ],
    )
    yield _codex("local shell", tools=[{"type": "local_shell"}])
    yield _codex(
        "tools in a namespace",
        tools=[_SHELL, _AGENTS],
    )
    yield _codex("web search", tools=[_SHELL, {"type": "web_search", "external_web_access": False}])
    for choice in ("none", "required", {"type": "function", "name": "shell"}):
        yield _codex(f"tool choice {choice}", tool_choice=choice)
    yield _codex("verbosity", text={"verbosity": "low"})
    yield _codex(
        "strict text",
        tools=None,
        tool_choice=None,
        text={
            "format": {
                "type": "json_schema",
                "name": "summary",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"ok": {"type": "boolean"}},
                    "required": ["ok"],
                    "additionalProperties": False,
                },
            }
        },
    )
    yield _codex("service tier, truncation", service_tier="auto", truncation="auto")
    yield _codex("metadata and user", metadata={"turn": "1"}, user="u", safety_identifier="s")
    yield _codex("sampling", temperature=1.0, top_p=0.9, max_tool_calls=4)


# --- OpenAI's Chat, as most other agents speak it


def _agent(name: str, **fields: Any) -> AgentRequest:
    body = {
        "messages": [
            {"role": "system", "content": "You are a coding agent."},
            {"role": "user", "content": "Mend a.py."},
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": "read", "description": "Reads.", "parameters": READ_SCHEMA},
            },
            {
                "type": "function",
                "function": {"name": "edit", "parameters": EDIT_SCHEMA, "strict": False},
            },
        ],
        "max_tokens": 8,
    }
    dropped = [key for key, value in fields.items() if value is None]
    body = {key: value for key, value in (body | fields).items() if key not in dropped}
    headers = {"http-referer": "https://agent.example", "x-title": "Agent"}
    return AgentRequest(
        name=f"chat: {name}", path="/v1/chat/completions", headers=headers, body=body
    )


def _chat() -> Iterator[AgentRequest]:
    yield _agent("first turn")
    yield _agent("a newer limit", max_tokens=None, max_completion_tokens=8)
    yield _agent(
        "parts with cache_control",
        messages=[
            {"role": "system", "content": [{"type": "text", "text": "Agent.", **EPHEMERAL}]},
            {"role": "user", "content": [{"type": "text", "text": "Mend a.py.", **EPHEMERAL}]},
        ],
    )
    yield _agent(
        "a developer and names",
        messages=[
            {"role": "developer", "content": "You are a coding agent."},
            {"role": "user", "name": "ann", "content": "Mend a.py."},
        ],
    )
    calls = [
        {
            "id": f"call_{n}",
            "type": "function",
            "function": {"name": "read", "arguments": '{"file_path":"/a.py"}'},
        }
        for n in (1, 2)
    ]
    yield _agent(
        "calls and results",
        messages=[
            {"role": "user", "content": "Mend a.py."},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "call_1", "content": "print(1)"},
            {
                "role": "tool",
                "tool_call_id": "call_2",
                "name": "read",
                "content": [{"type": "text", "text": "print(2)"}],
            },
            {"role": "assistant", "content": "", "reasoning_content": "Now the edit."},
            {"role": "user", "content": "Go on."},
        ],
    )
    for choice in (
        "auto",
        "none",
        "required",
        {"type": "function", "function": {"name": "read"}},
    ):
        yield _agent(f"tool choice {choice}", tool_choice=choice)
    yield _agent("parallel calls off", parallel_tool_calls=False)
    yield _agent(
        "what few servers know",
        reasoning_effort="low",
        verbosity="low",
        store=False,
        metadata={"a": "b"},
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        service_tier="auto",
        seed=1,
        logit_bias={},
        n=1,
        response_format={"type": "text"},
        stop=None,
        presence_penalty=0,
        frequency_penalty=0,
    )
