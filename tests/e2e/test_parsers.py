"""Small templates of each family: the parsers chosen by them read that family's answers."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripted_gateway import SpeakingEngine, behind_gateway, folder_with_template
from tokenspeed.entrypoint.parsers import Parsers, choose_parsers, lacks_tool_parser
from tokenspeed.loader import ModelFiles, Tokenizer

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Reads or lists.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}},
                "required": ["path"],
            },
        },
    }
    for name in ("read", "list")
]
QUESTION = [{"role": "user", "content": "Read a.py and list src."}]
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
WITH_TOOLS = "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
BOTH = [("read", {"path": "a.py"}), ("list", {"path": "src"})]
READ = BOTH[:1]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A template, what a model of it answers, and what a client is to get."""

    template: str
    parsers: tuple[str, str]
    answer: str
    calls: list[tuple[str, dict[str, str]]]
    content: str = ""
    reasoning: str = ""
    model_type: str = ""


def json_call(name: str, path: str, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: {"path": path}})


# A model of a family has a token of its own for each of these.
MARKS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *(
        f"<\uff5ctool\u2581{name}\uff5c>"
        for name in (
            *("calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep"),
        )
    ),
    *(f"<|tool_calls_section_{side}|>" for side in ("begin", "end")),
    *(f"<|tool_call_{part}|>" for part in ("begin", "argument_begin", "end")),
]


def deepseek(text: str) -> str:
    """Written with plain bars and underlines here, as they do not look alike."""
    return text.replace("|", "\uff5c").replace("_", "\u2581")


HERMES = (
    WITH_TOOLS + 'Call as <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call>\n' + TURNS
)
FAMILIES = {
    "hermes": Family(
        template=HERMES + "[assistant]",
        parsers=("qwen", "passthrough"),
        answer="On it.\n"
        + "\n".join(f"<tool_call>\n{json_call(n, a['path'])}\n</tool_call>" for n, a in BOTH),
        calls=BOTH,
        content="On it.",
    ),
    "qwen3": Family(
        template=HERMES + "{# reasoning: <think> </think> #}[assistant]",
        parsers=("qwen", "qwen3"),
        answer="<think>First a.py.</think>\n\n<tool_call>\n"
        + json_call("read", "a.py")
        + "\n</tool_call>",
        calls=READ,
        reasoning="First a.py.",
    ),
    "qwen3-thinking": Family(
        template=HERMES + "[assistant]<think>\n",
        parsers=("qwen", "qwen3_thinking"),
        answer=f"First a.py.</think>\n\n<tool_call>\n{json_call('read', 'a.py')}\n</tool_call>",
        calls=READ,
        reasoning="First a.py.",
    ),
    "qwen3-coder": Family(
        template=WITH_TOOLS
        + "<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>\n"
        + TURNS,
        parsers=("qwen_coder", "passthrough"),
        answer="\n".join(
            f"<tool_call>\n<function={n}>\n<parameter=path>\n{a['path']}\n</parameter>\n"
            "</function>\n</tool_call>"
            for n, a in BOTH
        ),
        calls=BOTH,
    ),
    "llama3": Family(
        template="<|start_header_id|>system<|end_header_id|>Environment: ipython\n"
        + WITH_TOOLS
        + 'Answer {"name": NAME, "parameters": ARGUMENTS}\n'
        + TURNS,
        parsers=("llama", "passthrough"),
        answer=json_call("read", "a.py", "parameters"),
        calls=READ,
    ),
    "deepseek-v3": Family(
        template=WITH_TOOLS
        + deepseek("<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>NAME")
        + "\n```json\nARGUMENTS\n```\n"
        + TURNS,
        parsers=("deepseek", "passthrough"),
        answer=deepseek("<|tool_calls_begin|>")
        + "\n".join(
            deepseek("<|tool_call_begin|>function<|tool_sep|>")
            + f"{n}\n```json\n{json.dumps(a)}\n```"
            + deepseek("<|tool_call_end|>")
            for n, a in BOTH
        )
        + deepseek("<|tool_calls_end|>"),
        calls=BOTH,
    ),
    "deepseek-r1": Family(
        template=TURNS + "{# </think> #}[assistant]<think>\n",
        model_type="deepseek_v3",
        parsers=("deepseek", "deepseek_r1"),
        answer="A file is text.</think>It is text.",
        calls=[],
        content="It is text.",
        reasoning="A file is text.",
    ),
    "deepseek-v3.1": Family(
        template=WITH_TOOLS
        + deepseek("<|tool_calls_begin|><|tool_call_begin|>NAME<|tool_sep|>ARGUMENTS")
        + TURNS,
        parsers=("deepseek31", "passthrough"),
        answer=deepseek("<|tool_calls_begin|>")
        + "".join(
            deepseek("<|tool_call_begin|>")
            + n
            + deepseek("<|tool_sep|>")
            + json.dumps(a)
            + deepseek("<|tool_call_end|>")
            for n, a in BOTH
        )
        + deepseek("<|tool_calls_end|>"),
        calls=BOTH,
    ),
    "kimi-k2": Family(
        template=WITH_TOOLS
        + "<|tool_calls_section_begin|><|tool_call_begin|>ID<|tool_call_argument_begin|>\n"
        + TURNS,
        parsers=("kimik2", "passthrough"),
        answer="<|tool_calls_section_begin|>"
        + "".join(
            f"<|tool_call_begin|>functions.{n}:{i}<|tool_call_argument_begin|>{json.dumps(a)}"
            "<|tool_call_end|>"
            for i, (n, a) in enumerate(BOTH)
        )
        + "<|tool_calls_section_end|>",
        calls=BOTH,
    ),
    "glm-4.5": Family(
        template=WITH_TOOLS
        + "<tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value></tool_call>\n"
        + "{# <think></think> #}"
        + TURNS,
        parsers=("glm45_moe", "glm45"),
        answer="<think>First a.py.</think>"
        + "".join(
            f"\n<tool_call>{n}\n<arg_key>path</arg_key>\n<arg_value>{a['path']}</arg_value>\n"
            "</tool_call>"
            for n, a in BOTH
        ),
        calls=BOTH,
        reasoning="First a.py.",
    ),
    "glm-4.7": Family(
        template=WITH_TOOLS
        + "<tool_call>{function-name}<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>"
        + "</tool_call>\n{# <think></think> #}"
        + TURNS,
        parsers=("glm47_moe", "glm45"),
        answer="<think>First a.py.</think>"
        + "".join(
            f"<tool_call>{n}<arg_key>path</arg_key><arg_value>{a['path']}</arg_value></tool_call>"
            for n, a in BOTH
        ),
        calls=BOTH,
        reasoning="First a.py.",
    ),
    "mistral": Family(
        template=WITH_TOOLS + "[TOOL_CALLS][]\n" + TURNS,
        parsers=("mistral", "passthrough"),
        answer="[TOOL_CALLS] ["
        + ", ".join(json_call(name, arguments["path"]) for name, arguments in BOTH)
        + "]",
        calls=BOTH,
    ),
}


def chosen_for(folder: Path, family: Family) -> Parsers:
    prompt = Tokenizer(folder).render_chat(QUESTION)
    return choose_parsers(family.template, prompt, model_type=family.model_type)


def streamed(lines: list[str]) -> dict[str, Any]:
    """The message that the deltas of a stream add up to."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for line in lines:
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or []:
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"function": {"name": "", "arguments": ""}})
                function = message["tool_calls"][call["index"]]["function"]
                function["name"] += call["function"].get("name") or ""
                function["arguments"] += call["function"].get("arguments") or ""
    return message


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_answers_are_read(qwen_coder: ModelFiles, tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    folder = folder_with_template(
        qwen_coder.tokenizer_dir, family.template, tmp_path / "model", MARKS
    )
    parsers = chosen_for(folder, family)
    assert (parsers.tool_call, parsers.reasoning) == family.parsers
    assert not lacks_tool_parser(family.template, parsers)
    engine = SpeakingEngine(folder, model_name="m")
    engine.text = family.answer

    async def ask() -> list[dict[str, Any]]:
        body = {"model": "m", "messages": QUESTION, "tools": TOOLS, "max_tokens": 900}
        async with behind_gateway(engine, parsers) as client:
            whole = await client.post("/v1/chat/completions", json=body)
            assert whole.status_code == 200, whole.text
            messages = [whole.json()["choices"][0]["message"]]
            # Alone, as few streams get their tokens; some together; all that there are.
            for engine.chunk_tokens in (1, 8, 1000):
                async with client.stream(
                    "POST", "/v1/chat/completions", json=body | {"stream": True}
                ) as answer:
                    messages.append(streamed([line async for line in answer.aiter_lines()]))
        return messages

    for message in asyncio.run(ask()):
        calls = [call["function"] for call in message.get("tool_calls") or []]
        found = [(call["name"], json.loads(call["arguments"])) for call in calls]
        assert found == family.calls, message
        assert (message["content"] or "").strip() == family.content
        assert (message.get("reasoning_content") or "").strip() == family.reasoning
