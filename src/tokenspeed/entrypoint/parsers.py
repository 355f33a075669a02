"""Which of the gateway's parsers reads a model's tool calls and reasoning."""

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "PASSTHROUGH",
    "REASONING_PARSERS",
    "TOOL_CALL_PARSERS",
    "Parsers",
    "choose_parsers",
    "read_template",
]

PASSTHROUGH = "passthrough"

# The names `smg launch` 1.13.0 accepts and starts with; it offers more, which only work together
# with `--parser symphony`.
TOOL_CALL_PARSERS = (
    "cohere",
    "deepseek",
    "deepseek31",
    "deepseek32",
    "deepseek_v4",
    "gemma4",
    "glm45_moe",
    "glm47_moe",
    "json",
    "kimi_k3",
    "kimik2",
    "llama",
    "minimax_m2",
    "minimax_m3",
    "mistral",
    "nemotron",
    PASSTHROUGH,
    "pythonic",
    "qwen",
    "qwen_coder",
    "qwen_xml",
    "step3",
)
REASONING_PARSERS = (
    "base",
    "cohere_cmd",
    "deepseek_r1",
    "deepseek_v31",
    "deepseek_v4",
    "gemma4",
    "glm45",
    "kimi",
    "kimi_k25",
    "kimi_k3",
    "kimi_thinking",
    "minimax",
    "minimax_m3",
    "nano_v3",
    PASSTHROUGH,
    "qwen3",
    "qwen3_thinking",
    "step3",
)

# The mark is written with a full-width bar and a lower block.
_DEEPSEEK_MARK = "<\uff5ctool\u2581calls\u2581begin\uff5c>"

# What a template must show, all of it, for a parser to fit; the first match wins, so that the
# more telling marks stand first.
_TOOL_MARKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<tool_call>", "<arg_key>"), "glm45_moe"),
    (("<tool_call>", "<function="), "qwen_coder"),
    (("<tool_call>",), "qwen"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|tool_calls_section_begin|>",), "kimik2"),
    (("<minimax:tool_call>",), "minimax_m2"),
    ((_DEEPSEEK_MARK, "```json"), "deepseek"),
    ((_DEEPSEEK_MARK,), "deepseek31"),
    (("<|python_tag|>",), "llama"),
    (("Environment: ipython",), "llama"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsers:
    """Names of the gateway's parsers; "passthrough" leaves the text as it is."""

    tool_call: str
    reasoning: str


def choose_parsers(template: str | None, generation_prompt: str = "") -> Parsers:
    """The parsers that fit a model.

    Args:
        template: the model's chat template (Jinja), or None where it has none.
        generation_prompt: what the template puts before an answer. Where it opens a block of
            reasoning itself, the answer holds only the end of that block.
    """
    if template is None:
        return Parsers(tool_call=PASSTHROUGH, reasoning=PASSTHROUGH)
    tool_call = next(
        (name for marks, name in _TOOL_MARKS if all(mark in template for mark in marks)),
        PASSTHROUGH,
    )
    if generation_prompt.rstrip().endswith("<think>"):
        reasoning = "qwen3_thinking"
    elif "</think>" in template:
        reasoning = "qwen3"
    else:
        reasoning = PASSTHROUGH
    return Parsers(tool_call=tool_call, reasoning=reasoning)


def read_template(tokenizer_dir: Path) -> str | None:
    """The chat template of a tokenizer's folder, or None where there is none."""
    path = tokenizer_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    path = tokenizer_dir / "tokenizer_config.json"
    if not path.is_file():
        return None
    template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(template, list):
        # Several named templates: the one for tools shows the marks of tool calls.
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("tool_use", named.get("default"))
    return template if isinstance(template, str) else None
