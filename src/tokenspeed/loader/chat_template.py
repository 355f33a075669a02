"""Renders a conversation with the template that comes with a model.

Templates are Jinja written for the helpers of the `transformers` library, and come from
strangers: they run in a sandbox that can change nothing.
"""

import contextlib
import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenspeed.core.errors import InvalidParameter, UnsupportedModel

__all__ = ["ChatTemplate"]

Message = Mapping[str, Any]

# What an expression of a template can raise, beside Jinja's own errors.
_RENDERING_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: names a template may use, such as `bos_token`, and their texts.

    Raises:
        UnsupportedModel: the template cannot be compiled.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UnsupportedModel(f"the model's chat template cannot be read: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as the model's text.

        Args:
            messages: in the form of OpenAI's chat API.
            tools: likewise; None for none.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            InvalidParameter: the template refuses these messages, or they lack what it needs.
        """
        try:
            return self._template.render(
                messages=[_plain(message) for message in messages],
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except _RENDERING_ERRORS as error:
            raise InvalidParameter(
                f"the model's chat template cannot render these messages: {error}"
            ) from error


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text content as one string, tool arguments as objects."""
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        plain["content"] = "".join(str(part.get("text", "")) for part in content)
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def _plain_call(call: Any) -> Any:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        # A model's own broken JSON comes back to it as the text it wrote.
        with contextlib.suppress(ValueError):
            function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which models were not trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return dt.datetime.now().astimezone().strftime(form)
