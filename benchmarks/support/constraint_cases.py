"""Constraints with texts that they take and texts that they do not, and hostile ones."""

import json
from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "HOSTILE", "Case"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A constraint; `kind` is "json", "regex" or "ebnf"."""

    name: str
    kind: str
    text: str
    takes: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()


def _schema(name: str, schema: Any, takes: list[Any], leaves: list[Any]) -> Case:
    """Texts are JSON already where they are text, values otherwise."""

    def texts(values: list[Any]) -> tuple[str, ...]:
        return tuple(
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
        )

    return Case(
        name=name, kind="json", text=json.dumps(schema), takes=texts(takes), leaves=texts(leaves)
    )


_CLOSED = {"additionalProperties": False}
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["street", "zip"],
            **_CLOSED,
        },
    },
    "required": ["name", "age", "tags", "address"],
    **_CLOSED,
}
_SOMEONE = {"name": "Zoë", "age": 7, "tags": ["a"], "address": {"street": "1", "zip": "2"}}
_TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            **_CLOSED,
        }
    },
}
_CALLS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "anyOf": [
            {
                "properties": {
                    "name": {"type": "string", "enum": [name]},
                    "parameters": {
                        "type": "object",
                        "properties": {argument: {"type": kind}},
                        "required": [argument],
                    },
                },
                "required": ["name", "parameters"],
            }
            for name, argument, kind in (("read", "path", "string"), ("wait", "ms", "integer"))
        ],
    },
}

CASES = (
    _schema("person", _PERSON, [_SOMEONE], [_SOMEONE | {"more": 1}, {"name": "x"}, "[]"]),
    _schema(
        "escapes", {"type": "string"}, ['"\\u00e9\\n\\""', '"日本\U0001f642"'], ['"\n"', "'a'"]
    ),
    _schema("object", {"type": "object"}, [{}, {"a": [1, {"b": None}]}], ["[]", "{,}", "1"]),
    _schema("enum", {"enum": ["a", "ab", 3, None]}, [3, None, '"ab"'], ['"b"', "33"]),
    _schema("const", {"const": {"a": [1]}}, [{"a": [1]}], [{"a": [2]}]),
    _schema(
        "integer range",
        {"type": "integer", "minimum": -3, "maximum": 12},
        [-3, 0, 12],
        [-4, 13, 112],
    ),
    _schema(
        "number range",
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        [0.5, 1],
        ["0", 1.5],
    ),
    _schema("integer from", {"type": "integer", "minimum": 100}, [100, 12345], [99, -1]),
    _schema("multiple", {"type": "integer", "multipleOf": 5}, [10, 0], [12]),
    _schema(
        "length",
        {"type": "string", "minLength": 2, "maxLength": 3},
        ['"ab"', '"日本語"'],
        ['"a"', '"abcd"'],
    ),
    _schema(
        "pattern",
        {"type": "string", "pattern": "^[a-z]{2}-\\d+$"},
        ['"ab-12"'],
        ['"ab-"', '"xab-1"'],
    ),
    _schema("pattern inside", {"type": "string", "pattern": "b+"}, ['"abc"'], ['"ac"']),
    _schema(
        "items",
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        ["[true]"],
        ["[]", "[true,true,true]", "[1]"],
    ),
    _schema(
        "tuple",
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "string"}],
            "items": False,
            "minItems": 2,
        },
        ['[1,"a"]'],
        ["[1]", '[1,"a",2]'],
    ),
    _schema(
        "optional",
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            **_CLOSED,
        },
        [{}, {"a": 1}, {"b": 2}, {"a": 1, "b": 2}],
        [{"c": 1}],
    ),
    _schema(
        "additional",
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "additionalProperties": {"type": "string"},
        },
        [{"a": 1, "z": "s"}],
        [{"a": 1, "z": 2}, {"a": "x"}],
    ),
    _schema(
        "pattern properties",
        {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, **_CLOSED},
        [{"x_a": 1}],
        [{"y": 1}],
    ),
    _schema(
        "any of",
        {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]},
        [7, '"a"'],
        ['"ab"', "null"],
    ),
    _schema(
        "one of",
        {
            "oneOf": [
                {"type": "object", "properties": {"k": {"const": c}}, "required": ["k"], **_CLOSED}
                for c in "ab"
            ]
        },
        [{"k": "a"}],
        [{"k": "c"}],
    ),
    _schema(
        "all of",
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"b": {"type": "string"}}, "required": ["b"]},
            ]
        },
        [{"a": 1, "b": ""}],
        [{"a": 1}],
    ),
    _schema("nullable", {"type": ["integer", "null"]}, [1, None], ['"a"']),
    _schema(
        "tree", _TREE, [{"value": 1, "children": [{"value": 2, "children": []}]}], [{"value": 1}]
    ),
    _schema(
        "date", {"type": "string", "format": "date"}, ['"2026-11-21"'], ['"2026-13-21"', '"x"']
    ),
    _schema(
        "uuid",
        {"type": "string", "format": "uuid"},
        ['"123e4567-e89b-12d3-a456-426614174000"'],
        ['"1"'],
    ),
    _schema(
        "tool calls",
        _CALLS,
        ['[{"name":"read","parameters":{"path":"a"}}]'],
        ["[]", '[{"name":"read","parameters":{"ms":1}}]'],
    ),
    _schema(
        "property names",
        {"type": "object", "propertyNames": {"maxLength": 1}},
        [{"a": 1}],
        [{"ab": 1}],
    ),
    _schema(
        "property count", {"type": "object", "maxProperties": 1}, [{"a": 1}], [{"a": 1, "b": 2}]
    ),
    _schema(
        "unique",
        {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True},
        ["[1,2]"],
        ["[1,1]"],
    ),
    _schema("not", {"type": "integer", "not": {"const": 3}}, [4], [3]),
    _schema(
        "if then",
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "if": {"required": ["a"]},
            "then": {"required": ["b"]},
        },
        [{"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    _schema("contains", {"type": "array", "contains": {"const": 1}}, ["[1]"], ["[2]"]),
    _schema(
        "dependent",
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        [{"b": 1}],
        [{"a": 1}],
    ),
    _schema("false", False, [], ["1", "{}"]),
    Case(
        name="digits",
        kind="regex",
        text="[0-9]{3}-[0-9]{4}",
        takes=("555-1234",),
        leaves=("555-12", "5551234"),
    ),
    Case(
        name="words",
        kind="regex",
        text="(foo|bar)+(baz)?",
        takes=("foobarbaz",),
        leaves=("baz", "foobazfoo"),
    ),
    Case(name="unicode", kind="regex", text="[äöü日]+\\.", takes=("ä日.",), leaves=("a.",)),
    Case(
        name="dot", kind="regex", text="a.c", takes=("abc", "a\U0001f642c"), leaves=("ac", "a\nc")
    ),
    Case(name="classes", kind="regex", text="\\w+\\s\\d+", takes=("ab 12",), leaves=("ab12",)),
    Case(name="anchors", kind="regex", text="^ab$", takes=("ab",), leaves=("aab",)),
    Case(name="look-ahead", kind="regex", text="(?!foo)[a-z]+", takes=("bar",), leaves=("foo",)),
    Case(name="back-reference", kind="regex", text="(a|b)\\1", takes=("aa",), leaves=("ab",)),
    Case(name="word boundary", kind="regex", text="a\\b c", takes=("a c",), leaves=("ab",)),
    Case(
        name="sums",
        kind="ebnf",
        text='root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"',
        takes=("1+(22+3)", "4"),
        leaves=("1+", "(1", "+1"),
    ),
    Case(
        name="balanced",
        kind="ebnf",
        text='root ::= "a" root "b" | ""',
        takes=("aabb", "ab"),
        leaves=("aab", "ba"),
    ),
    Case(
        name="ambiguous",
        kind="ebnf",
        text='root ::= root root | "a"',
        takes=("a", "aaaa"),
        leaves=("b",),
    ),
    Case(
        name="repeats",
        kind="ebnf",
        text='root ::= [a-c]{2,3} "é"?',
        takes=("abc", "abé"),
        leaves=("a", "abcc"),
    ),
)


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _doubling(depth: int) -> dict[str, Any]:
    """2 to the power of `depth` ways, written down in `depth` lines."""
    definitions: dict[str, Any] = {
        f"n{level}": {
            "type": "object",
            "properties": {key: {"$ref": f"#/$defs/n{level + 1}"} for key in "ab"},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
        for level in range(depth)
    }
    definitions[f"n{depth}"] = {"type": "integer"}
    return {"$ref": "#/$defs/n0", "$defs": definitions}


def _merging(depth: int) -> dict[str, Any]:
    """allOf of anyOfs: the product of all choices."""
    choices = [
        {
            "anyOf": [
                {"type": "object", "properties": {f"p{level}": {"const": value}}}
                for value in range(4)
            ]
        }
        for level in range(depth)
    ]
    return {"allOf": choices}


HOSTILE = (
    _schema("2^30 by references", _doubling(30), [], []),
    _schema("4^12 by allOf", _merging(12), [], []),
    _schema("nested 200", _nested(200), [], []),
    Case(
        name="nested 100000 objects", kind="json", text='{"items":' * 100_000 + "{}" + "}" * 100_000
    ),
    _schema("enum of 100000", {"enum": [f"value-{n:07}" for n in range(100_000)]}, [], []),
    _schema(
        "10000 properties",
        {
            "type": "object",
            "properties": {f"p{n}": {"type": "integer"} for n in range(10_000)},
            **_CLOSED,
        },
        [],
        [],
    ),
    _schema(
        "3000 required",
        {
            "type": "object",
            "properties": {f"p{n}": {"type": "integer"} for n in range(3000)},
            "required": [f"p{n}" for n in range(3000)],
        },
        [],
        [],
    ),
    _schema("maxLength 10^9", {"type": "string", "maxLength": 10**9}, [], []),
    _schema(
        "minLength 10^5", {"type": "string", "minLength": 10**5, "maxLength": 2 * 10**5}, [], []
    ),
    _schema(
        "minItems 10^6", {"type": "array", "items": {"type": "integer"}, "minItems": 10**6}, [], []
    ),
    _schema("reference to itself", {"$ref": "#"}, [], []),
    _schema(
        "reference in a circle",
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        [],
        [],
    ),
    _schema("reference over the network", {"$ref": "http://127.0.0.1:9/schema.json"}, [], []),
    _schema(
        "unending value",
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        [],
        [],
    ),
    _schema(
        "pattern of patterns",
        {"type": "string", "pattern": "^((((a{1,50}){1,50}){1,50}){1,50})$"},
        [],
        [],
    ),
    Case(name="(a+)+b", kind="regex", text="(a+)+b"),
    Case(name="(a|a)*{30}", kind="regex", text="((a|a)*){30}c"),
    Case(name="2^40 states", kind="regex", text="(a|b)*a(a|b){40}"),
    Case(name="a{100000}", kind="regex", text="a{100000}"),
    Case(name="((a{100}){100}){100}", kind="regex", text="((a{100}){100}){100}"),
    Case(name=".{0,50000}x", kind="regex", text="(.{0,50000}x){3}"),
    Case(name="100000 brackets", kind="regex", text="(" * 100_000 + "a" + ")" * 100_000),
    Case(name="all of Unicode, 200 times", kind="regex", text="[\\p{L}\\p{N}]{200}[^\\p{L}]{200}"),
    Case(name="20000 words", kind="regex", text="|".join(f"w{n}x{n * 7}" for n in range(20_000))),
    Case(name="left recursion", kind="ebnf", text='root ::= root "a" | root root root | ""'),
    Case(name="no end", kind="ebnf", text='root ::= "a" root'),
    Case(
        name="10000 rules",
        kind="ebnf",
        text="root ::= r0\n"
        + "".join(f'r{n} ::= "a" r{n + 1} | r{n + 1}\n' for n in range(10_000))
        + 'r10000 ::= "b"',
    ),
    Case(
        name="50000 brackets", kind="ebnf", text="root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000
    ),
)
