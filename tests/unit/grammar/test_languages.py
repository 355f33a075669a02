"""What a constraint takes is what it says, token by token."""

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.grammars import ENDS, SPECIAL, TABLE, V, grammar, next_of, takes
from tokenspeed.core.constraint import ConstraintKind, StructuredOutputs
from tokenspeed.core.errors import InvalidParameter
from tokenspeed.grammar.tokens import longest_match

CLOSED = {"additionalProperties": False}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    **CLOSED,
}
CALLS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"name": {"const": "foo"}, "parameters": PERSON},
        "required": ["name", "parameters"],
    },
}
TAG = json.dumps(
    {
        "structures": [{"begin": "<tool>foo", "schema": {"type": "integer"}, "end": "!"}],
        "triggers": ["<tool>"],
    }
)
SPECIAL_TAG = TAG.replace("<tool>", "<|t|>")

LANGUAGES = [
    (
        {"json": PERSON},
        ['{"name":"é日🙂","age":3}', '{ "name": "",\n "age": 12 }'],
        [
            '{"name":""}',
            '{"age":1,"name":""}',
            '{"name":"","age":-1}',
            '{"name":"","age":1,"x":1}',
            '{"name":"","age":1}}',
        ],
    ),
    (
        {"json": CALLS},
        ['[{"name":"foo","parameters":{"name":"a","age":1}}]'],
        ["[]", '[{"name":"bar","parameters":{"name":"a","age":1}}]'],
    ),
    ({"json": '{"enum":["foo",true]}'}, ['"foo"', "true"], ['"bar"', "null"]),
    ({"json": "true"}, ["null", "[1,{}]"], ["foo"]),
    (
        {"json": {"type": "string", "minLength": 2, "maxLength": 2}},
        ['"ab"', '"日本"'],
        ['"a"', '"abc"'],
    ),
    (
        {"json": {"type": "array", "items": {"type": "null"}, "maxItems": 1}},
        ["[]", "[null]"],
        ["[null,null]"],
    ),
    ({"json_object": True}, ["{}", '{"foo":[true]}'], ["[]", "true"]),
    ({"regex": "(foo|bar)+[0-9]{2}"}, ["foobar12"], ["foo1", "12", "foo123"]),
    ({"regex": "^ab$"}, ["ab"], ["aab"]),
    ({"regex": r"\++[*+]+"}, ["++*+"], ["+", "a"]),
    ({"regex": "[日é]+"}, ["日é"], ["ab", "日🙂"]),
    ({"regex": ".{2}"}, ["🙂é"], ["é", "\n\n"]),
    ({"choice": ("foo", 'say "ab"')}, ["foo", 'say "ab"'], ["fo", "bar", "foofoo"]),
    ({"grammar": 'root ::= "a" root "b" | ""'}, ["", "ab", "aabb"], ["aab", "b"]),
    ({"grammar": 'root ::= item ("+" item)*\nitem ::= [0-9]+'}, ["12+3"], ["12+", "+1"]),
    ({"grammar": 'start: "foo" NUMBER\nNUMBER: /[0-9]+/'}, ["foo12"], ["foo"]),
    (
        {"structural_tag": TAG},
        ["any text", "see <tool>foo12! and <tool>foo3!"],
        ["<tool>bar", "<tool>foo12", "<tool>foo true!"],
    ),
]


def tokens_of(text: str, *, cut: bool) -> list[int]:
    """A token a byte, or the longest tokens."""
    return list(text.encode()) if cut else longest_match(TABLE)(text.encode())


@pytest.mark.parametrize("cut", [False, True], ids=["tokens", "bytes"])
@pytest.mark.parametrize(
    ("constraint", "inside", "outside"), LANGUAGES, ids=lambda value: str(value)[:40]
)
def test_a_constraint_takes_what_it_says_and_no_more(
    constraint: dict[str, Any], inside: list[str], outside: list[str], cut: bool
) -> None:
    compiled = grammar(StructuredOutputs(**constraint))
    for text in inside:
        # Where a grammar leaves no choice of text there is none of tokens either: a byte, where a
        # longer token says the same, need not be taken.
        if not cut or (not text.isascii() and "regex" in constraint):
            assert takes(compiled, tokens_of(text, cut=cut)), text
    for text in outside:
        assert not takes(compiled, tokens_of(text, cut=cut)), text


def test_tokens_that_are_parts_of_characters_are_taken_where_the_whole_is() -> None:
    half = TABLE.texts.index("日本".encode()[:4])
    rest = TABLE.texts.index("🙂".encode()[1:])
    word = grammar(StructuredOutputs(json={"type": "string"}))
    quote = ord('"')
    assert takes(word, [quote, half, *"本".encode()[1:], quote])
    assert takes(word, [quote, "🙂".encode()[0], rest, quote])
    # A character must be whole before the text goes on.
    assert not takes(word, [quote, half, quote])
    assert not takes(word, [quote, rest, quote])
    assert takes(grammar(StructuredOutputs(regex="日本")), [half, *"本".encode()[1:]])
    assert not takes(grammar(StructuredOutputs(regex="日é")), [half, *"本".encode()[1:]])


def test_ends_come_only_where_the_text_may_end_and_special_tokens_never() -> None:
    matcher = grammar(StructuredOutputs(regex="ab?")).matcher()
    assert next_of(matcher).isdisjoint(SPECIAL)
    matcher.take([ord("a")])
    assert next_of(matcher) == {ord("b"), *ENDS}
    matcher.take([ord("b")])
    assert next_of(matcher) == set(ENDS)
    anything = grammar(StructuredOutputs(regex="(.|\n)*"))
    assert next_of(anything.matcher()).isdisjoint(set(SPECIAL) - set(ENDS))
    assert max(next_of(anything.matcher())) < V - 5


def test_a_special_token_triggers_a_tag() -> None:
    compiled = grammar(StructuredOutputs(structural_tag=SPECIAL_TAG))
    trigger = TABLE.texts.index(b"<|t|>")
    assert takes(compiled, [*b"ab", trigger, *tokens_of("foo12!", cut=False)])
    assert not takes(compiled, [trigger, *tokens_of("bar", cut=False)])


def test_white_space_of_json_comes_to_an_end() -> None:
    matcher = grammar(StructuredOutputs(json_object=True)).matcher()
    matcher.take([ord("{")])
    assert ord(" ") in next_of(matcher)
    matcher.take([ord("\n")])
    matcher.take([ord(" ")] * 64)
    assert all(TABLE.texts[token].strip() for token in next_of(matcher))


def test_a_matcher_begins_where_its_grammar_does_whatever_others_did() -> None:
    compiled = grammar(StructuredOutputs(regex="foo|bar"))
    first, second = compiled.matcher(), compiled.matcher()
    first.take([ord("f")])
    assert ord("b") in next_of(second)
    assert ord("b") not in next_of(first)
    with pytest.raises(InvalidParameter):
        second.take([ord("x")])
    assert next_of(first)


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"not": {"type": "null"}}}, "not"),
        ({"json": {"if": {}, "then": False}}, "if"),
        ({"json": {"type": "array", "contains": {}}}, "contains"),
        ({"json": {"$ref": "http://example.com/schema"}}, "example.com"),
        ({"json": {"type": "integer", "x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"json": {"type": "sequence"}}, "sequence"),
        ({"json": "{"}, "JSON"),
        ({"json": "[]"}, "schema"),
        ({"json": '{"a":' * 5000}, "JSON"),
        ({"regex": "(?=a)b"}, "look"),
        ({"regex": "(a)\\1"}, "backreference"),
        ({"regex": "["}, "regex"),
        ({"regex": "a*+a"}, "possessive"),
        ({"regex": "[+]{2}+a"}, "possessive"),
        ({"json": "false"}, "nothing"),
        ({"grammar": "root ::= missing"}, "missing"),
        ({"grammar": "root ::= " + "(" * 9000}, "deep"),
        ({"structural_tag": "{}"}, "triggers"),
        ({"structural_tag": '{"structures":[],"triggers":["a"]}'}, "structure"),
        ({"structural_tag": TAG.replace('["<tool>"]', '["<other>"]')}, "trigger"),
        ({"structural_tag": TAG.replace('"end": "!"', '"end": 1')}, "str"),
        ({"structural_tag": '{"type":"structural_tag","format":{}}'}, "triggers"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_enforced_is_refused_by_name(constraint: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        grammar(StructuredOutputs(**constraint))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "constraint",
    [
        {},
        {"json": "{}", "regex": "a"},
        {"json_object": False},
        {"choice": ()},
        {"regex": "\ud800"},
        {"regex": "a" * (1 << 20) + "a"},
        {"json": {"a": object()}},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_constraint_is_one_of_its_kinds_and_small(constraint: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter):
        StructuredOutputs(**constraint)


def test_a_schema_given_as_an_object_is_its_text() -> None:
    constraint = StructuredOutputs(json={"type": "null"})
    assert constraint == StructuredOutputs(json='{"type":"null"}')
    assert (constraint.kind, constraint.text) == (ConstraintKind.JSON_SCHEMA, '{"type":"null"}')


FRAGMENTS = [
    "a",
    "b",
    ".",
    "[a-c]",
    "[^a]",
    "[0-9]",
    "(",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{2}",
    "{1,3}",
    "é",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join), st.integers(0, 2**32))
def test_what_a_pattern_lets_through_matches_it(pattern: str, seed: int) -> None:
    try:
        compiled = grammar(StructuredOutputs(regex=pattern))
        expected = re.compile(pattern)
    except (InvalidParameter, re.error):
        return
    choose = np.random.default_rng(seed)
    matcher = compiled.matcher()
    text = b""
    for _ in range(60):
        allowed = next_of(matcher)
        ended = allowed & set(ENDS)
        going_on = sorted(allowed - ended)
        assert bool(ended) == _matches(expected, text), (pattern, text)
        if not going_on or (ended and choose.random() < 0.2):
            return
        token = going_on[choose.integers(len(going_on))]
        matcher.take([token])
        text += TABLE.texts[token]


def _matches(pattern: re.Pattern[str], text: bytes) -> bool:
    try:
        return pattern.fullmatch(text.decode()) is not None
    except UnicodeDecodeError:
        return False
