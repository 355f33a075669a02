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
    "lacks_tool_parser",
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

# DeepSeek's marks are written with full-width bars and lower blocks.
_DEEPSEEK_CALLS = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
_DEEPSEEK_DSML = "\uff5cDSML\uff5c"

# What a template must show, all of it, for a parser to fit; the first match wins, so that the
# more telling marks stand first.
_TOOL_MARKS: tuple[tuple[tuple[str, ...], str], ...] = (
    # GLM 4.5 puts a line break between a function's name and its first argument, 4.7 does not.
    (("<tool_call>", "-name}<arg_key>"), "glm47_moe"),
    (("<tool_call>", "<arg_key>"), "glm45_moe"),
    (("<tool_call>", "<function="), "qwen_coder"),
    (("<tool_call>",), "qwen"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|tool_calls_section_begin|>",), "kimik2"),
    (("<minimax:tool_call>",), "minimax_m2"),
    ((_DEEPSEEK_DSML,), "deepseek32"),
    ((_DEEPSEEK_CALLS, "```json"), "deepseek"),
    ((_DEEPSEEK_CALLS,), "deepseek31"),
    (("<|python_tag|>",), "llama"),
    (("Environment: ipython",), "llama"),
    (("<|start_header_id|>", "tools"), "llama"),
)

# Where a template shows nothing of tool calls, or there is none: what the model's type says.
_TOOL_TYPES = {
    "deepseek_v3": "deepseek",
    "deepseek_v32": "deepseek32",
    "glm4_moe": "glm45_moe",
    "kimi_k2": "kimik2",
    "ministral3": "mistral",
    "mistral3": "mistral",
}

# What reads reasoning that a model opens itself, by what reads its tool calls.
_REASONING_BESIDE = {
    "deepseek31": "deepseek_v31",
    "deepseek32": "deepseek_v31",
    "glm45_moe": "glm45",
    "glm47_moe": "glm45",
    "kimik2": "kimi_k25",
}

# The gateway reads and writes the channels of these models by itself, whatever parsers it is given.
_HARMONY_TYPES = ("gpt_oss",)
_HARMONY_MARKS = ("<|channel|>", "<|message|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsers:
    """Names of the gateway's parsers; "passthrough" leaves the text as it is.

    Attributes:
        tool_call, reasoning: the names.
        harmony: the gateway reads the model's channels itself; neither parser is asked.
    """

    tool_call: str
    reasoning: str
    harmony: bool = False


def choose_parsers(
    template: str | None, generation_prompt: str = "", *, model_type: str = ""
) -> Parsers:
    """The parsers that fit a model.

    Args:
        template: the model's chat template (Jinja), or None where it has none.
        generation_prompt: what the template puts before an answer. Where it opens a block of
            reasoning itself, the answer holds only the end of that block.
        model_type: of the model's `config.json`; asked where the template does not tell.
    """
    text = template or ""
    if model_type in _HARMONY_TYPES or all(mark in text for mark in _HARMONY_MARKS):
        return Parsers(tool_call=PASSTHROUGH, reasoning=PASSTHROUGH, harmony=True)
    tool_call = next(
        (name for marks, name in _TOOL_MARKS if all(mark in text for mark in marks)), None
    )
    tool_call = tool_call or _TOOL_TYPES.get(model_type) or PASSTHROUGH
    return Parsers(
        tool_call=tool_call, reasoning=_reasoning_parser(text, tool_call, generation_prompt)
    )


def lacks_tool_parser(template: str | None, parsers: Parsers) -> bool:
    """Whether a template offers tools whose calls would come as text."""
    offers = template is not None and "tools" in template
    return offers and not parsers.harmony and parsers.tool_call == PASSTHROUGH


def _reasoning_parser(template: str, tool_call: str, generation_prompt: str) -> str:
    if "\u25c1think\u25b7" in template:
        return "kimi"
    if generation_prompt.rstrip().endswith("<think>"):
        return "deepseek_r1" if tool_call.startswith("deepseek") else "qwen3_thinking"
    if "</think>" not in template:
        return PASSTHROUGH
    return _REASONING_BESIDE.get(tool_call, "qwen3")


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
