"""What the text of an answer must be."""

import enum
import json
from typing import Any

from tokenspeed.core.errors import InvalidParameter
from tokenspeed.core.records import Record, set_field

__all__ = ["CONSTRAINT_SIZE_MAX_BYTES", "ConstraintKind", "StructuredOutputs"]

CONSTRAINT_SIZE_MAX_BYTES = 1 << 20
"""Most bytes of a constraint's text."""

CHOICES_MAX = 10_000


class ConstraintKind(enum.StrEnum):
    """How a constraint is written down."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    EBNF = "ebnf"
    STRUCTURAL_TAG = "structural_tag"


class StructuredOutputs(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A constraint: exactly one of the fields is given. Enforced or refused, never ignored.

    Attributes:
        json: a JSON schema, as an object or as its text: the answer is a JSON value that it takes.
        json_object: true: the answer is some JSON object.
        regex: a regular expression that the whole answer matches.
        choice: texts, one of which the answer is.
        grammar: a context-free grammar in EBNF as llama.cpp (`root ::= ...`) or Lark write it.
        structural_tag: the text of a JSON object with `structures` (each a `begin`, a JSON
            `schema` and an `end`) and `triggers`: text is free until a trigger was written, from
            where on one of the structures that begin so must follow.

    Raises:
        InvalidParameter: none of them is given, or several, or one is malformed or too large.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        given = [name for name, value in values.items() if value is not None and value is not False]
        if len(given) != 1:
            raise InvalidParameter(
                f"structured_outputs takes exactly one of {', '.join(values)}, but has "
                f"{' and '.join(given) or 'none'}"
            )
        if isinstance(self.json, dict):
            # As text it crosses to the engine however deep it is nested.
            set_field(self, "json", _json_text(self.json))
        if self.choice is not None and not 1 <= len(self.choice) <= CHOICES_MAX:
            raise InvalidParameter(
                f"choice must hold 1 to {CHOICES_MAX} texts, but holds {len(self.choice)}"
            )
        try:
            size_bytes = len(self.text.encode())
        except UnicodeEncodeError:
            raise InvalidParameter(
                f"the {self.kind} constraint holds half of a surrogate pair, which is no text"
            ) from None
        if size_bytes > CONSTRAINT_SIZE_MAX_BYTES:
            raise InvalidParameter(
                f"the {self.kind} constraint has {size_bytes} bytes; "
                f"{CONSTRAINT_SIZE_MAX_BYTES} are the most"
            )

    @property
    def kind(self) -> ConstraintKind:
        """Which of the fields is given."""
        if self.json is not None:
            return ConstraintKind.JSON_SCHEMA
        if self.json_object:
            return ConstraintKind.JSON_OBJECT
        if self.regex is not None:
            return ConstraintKind.REGEX
        if self.choice is not None:
            return ConstraintKind.CHOICE
        if self.grammar is not None:
            return ConstraintKind.EBNF
        return ConstraintKind.STRUCTURAL_TAG

    @property
    def text(self) -> str:
        """What is given, as text; choices as a JSON array."""
        if self.json_object:
            return '{"type":"object"}'
        if self.choice is not None:
            return _json_text(self.choice)
        given = (self.json, self.regex, self.grammar, self.structural_tag)
        return next(value for value in given if isinstance(value, str))


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameter(f"the constraint cannot be written as JSON: {error}") from None
