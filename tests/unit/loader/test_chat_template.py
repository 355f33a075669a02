"""Chat templates: what models expect of them, and what strangers may not do with them."""

from typing import Any

import pytest

from tokenspeed import loader
from tokenspeed.core.errors import InvalidParameter, UnsupportedModel
from tokenspeed.loader.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "read", "description": "a < b & c", "parameters": {"type": "object"}},
    }
]


def _render(source: str, messages: list[dict[str, Any]] = USER, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options)


def test_a_template_sees_what_transformers_gives_one() -> None:
    assert _render("{{ bos_token }}{{ messages[0].content }}") == "<s>hi"
    assert _render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
    assert _render("{{ tools is none }}") == "True"
    assert len(_render("{{ strftime_now('%Y') }}")) == 4
    assert _render("{% for m in messages %}{% break %}{% endfor %}x") == "x"
    assert _render("  {% if true %}\n  a\n{% endif %}\n") == "  a\n"


def test_json_is_neither_escaped_for_html_nor_for_ascii() -> None:
    message = [{"role": "user", "content": "<é&'\"\u2028>"}]
    assert _render("{{ messages[0].content | tojson }}", message) == '"<é&\'\\"\u2028>"'
    assert _render("{{ {'b': 1, 'a': 2} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": 2\n}'


def test_tool_arguments_are_objects_and_parts_are_one_text() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
                {"type": "function", "function": {"name": "g", "arguments": '{"x": '}},
            ],
        },
    ]
    source = (
        "{{ messages[0].content }}"
        "{% for c in messages[1].tool_calls %} {{ c.function.arguments | tojson }}{% endfor %}"
    )
    assert _render(source, messages) == 'ab {"x": 1} "{\\"x\\": "'
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'


def test_qwen_is_told_of_tools_and_of_their_results(qwen_coder: loader.ModelFiles) -> None:
    tokenizer = loader.Tokenizer(qwen_coder.tokenizer_dir)
    call = {"type": "function", "function": {"name": "read", "arguments": '{"path": "a.py"}'}}
    text = tokenizer.render_chat(
        [
            {"role": "user", "content": "Read a.py"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "print(1)"},
        ],
        tools=TOOLS,
    )
    assert '"description": "a < b & c"' in text
    assert '<tool_call>\n{"name": "read", "arguments": {"path": "a.py"}}\n</tool_call>' in text
    assert "<tool_response>\nprint(1)\n</tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert tokenizer.render_chat(USER, add_generation_prompt=False).endswith("hi<|im_end|>\n")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].missing.deeper }}",
        "{{ 'a' + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ range(10**9) | list }}",
        "{{ 1 // 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_bad_request(source: str) -> None:
    with pytest.raises(InvalidParameter, match="chat template"):
        _render(source)


def test_a_refusal_keeps_the_templates_own_words() -> None:
    with pytest.raises(InvalidParameter, match="roles must alternate"):
        _render("{{ raise_exception('roles must alternate') }}")


def test_a_template_that_is_no_jinja_is_unsupported() -> None:
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        ChatTemplate("{% if %}", {})
