"""From a constraint to a grammar as llguidance reads it. Runs where it may take too long: in the
trial's process only.
"""

import json
import re
from typing import TYPE_CHECKING, Any

import llguidance
import msgspec
from llguidance.gbnf_to_lark import any_to_lark

from tokenspeed.core.constraint import ConstraintKind
from tokenspeed.core.errors import InvalidParameter

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

__all__ = ["grammar_of"]

_JSON_OPTIONS: "JsonCompileOptions" = {
    # White space without end would be a way never to come to one: a line break and its
    # indentation, or a space, is all that anybody writes.
    "whitespace_pattern": r"(\n[ \t]{0,64}|[ ])",
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
# A schema may hold options of the library, and these would change what it means.
_OPTIONS_KEY = "x-guidance"

_ESCAPED_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_POSSESSIVE = re.compile(r"[*+?}]\+")
_NAMEABLE = re.compile(r"<[^<>\s]+>\Z")
_TAG_KEYS = {"type", "structures", "triggers"}
_STRUCTURE_KEYS = {"begin", "schema", "end"}


def grammar_of(kind: ConstraintKind, text: str, *, special: frozenset[str]) -> str:
    """A grammar that says what the constraint says.

    Args:
        kind: how `text` is to be read.
        text: the constraint.
        special: texts of the tokens that are no text.

    Raises:
        InvalidParameter: names what is malformed or cannot be enforced. That nothing is wrong here
            does not mean that the library takes the grammar.
    """
    try:
        match kind:
            case ConstraintKind.JSON_SCHEMA | ConstraintKind.JSON_OBJECT:
                return _json(text)
            case ConstraintKind.REGEX:
                return _regex(text)
            case ConstraintKind.CHOICE:
                return _choice(text)
            case ConstraintKind.EBNF:
                return llguidance.LLMatcher.grammar_from_lark(any_to_lark(text))
            case ConstraintKind.STRUCTURAL_TAG:
                return _structural_tag(text, special)
    except RecursionError:
        raise InvalidParameter("it is nested too deep") from None
    except InvalidParameter:
        raise
    except Exception as error:
        # The converters raise plain Exception, ValueError and KeyError for what they cannot read.
        raise InvalidParameter(str(error) or type(error).__name__) from None


def _json(text: str) -> str:
    schema = _decoded(text)
    _check_schema(schema)
    # The library takes its options with an object only.
    text = "{}" if schema is True else text
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        raise InvalidParameter(f"it is no JSON: {error}") from None


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, dict | bool):
        raise InvalidParameter("a JSON schema is an object or true")
    if schema is False:
        raise InvalidParameter("the schema false takes nothing")
    if isinstance(schema, dict) and _OPTIONS_KEY in schema:
        raise InvalidParameter(f"{_OPTIONS_KEY} is not taken; leave it out")


def _regex(text: str) -> str:
    # The library reads `a*+` as `(a*)+`; who writes it means that `a*` gives nothing back.
    if _POSSESSIVE.search(_ESCAPED_OR_CLASS.sub("x", text)):
        raise InvalidParameter("possessive quantifiers are not supported")
    return llguidance.LLMatcher.grammar_from_regex(text)


def _choice(text: str) -> str:
    choices = msgspec.json.decode(text, type=list[str])
    return llguidance.LLMatcher.grammar_from_lark(
        "start: " + " | ".join(json.dumps(choice) for choice in choices)
    )


def _structural_tag(text: str, special: frozenset[str]) -> str:
    tag = _decoded(text)
    if not isinstance(tag, dict) or not {"structures", "triggers"} <= tag.keys() <= _TAG_KEYS:
        raise InvalidParameter(
            'a structural tag is an object with "structures" and "triggers", and nothing beside '
            'them but "type"'
        )
    triggers = msgspec.convert(tag["triggers"], list[str])
    tags = []
    for structure in msgspec.convert(tag["structures"], list[dict[str, Any]]):
        if structure.keys() != _STRUCTURE_KEYS:
            raise InvalidParameter(f"a structure has {', '.join(sorted(_STRUCTURE_KEYS))}")
        begin, end = (msgspec.convert(structure[key], str) for key in ("begin", "end"))
        schema = structure["schema"]
        _check_schema(schema)
        trigger = next((item for item in triggers if item and begin.startswith(item)), None)
        if trigger is None:
            raise InvalidParameter(f"no trigger begins {begin!r}")
        options = {_OPTIONS_KEY: _JSON_OPTIONS}
        tags.append(
            llguidance.StructTag(
                trigger=trigger,
                begin=begin,
                grammar=options if schema is True else {**schema, **options},
                end=end,
            )
        )
    if not tags:
        raise InvalidParameter("a structural tag needs at least one structure")
    used = {tag.trigger for tag in tags}
    if not used & special:
        return llguidance.StructTag.to_grammar(tags, assume_special=False)
    if not all(item in special and _NAMEABLE.match(item) for item in used):
        raise InvalidParameter("some triggers are special tokens and some are not")
    return llguidance.StructTag.to_grammar(tags, assume_special=True)
