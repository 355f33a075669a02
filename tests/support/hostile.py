"""Constraints made to hurt: too large, too deep, without end, malformed, or just strange."""

import json
from collections.abc import Iterator
from typing import Any

__all__ = ["hostile_constraints"]

Constraint = tuple[str, str]
"""A field of the gateway's SamplingParams, and its value."""


def hostile_constraints() -> list[Constraint]:
    """More than 200 of them, the same every time."""
    schemas = [("json_schema", text) for text in _schemas()]
    return [
        *schemas,
        *(("regex", text) for text in _regexes()),
        *(("ebnf_grammar", text) for text in _grammars()),
        *(("structural_tag", text) for text in _tags()),
    ]


def _schemas() -> Iterator[str]:
    for depth in (5, 20, 50, 60, 70, 120, 400, 5000, 50_000):
        yield '{"items":' * depth + "{}" + "}" * depth
        yield '{"properties":{"a":' * depth + "{}" + "}}" * depth
        yield '{"anyOf":[' * depth + "{}" + "]}" * depth
        yield "[" * depth
    for depth in (1, 4, 12, 30, 60):
        yield json.dumps(_doubling(depth))
        yield json.dumps(_merging(depth))
        yield json.dumps({"oneOf": [{"allOf": _merging(3)["allOf"]}] * depth})
    for count in (10, 1000, 20_000):
        yield json.dumps({"enum": [f"value {n}" for n in range(count)]})
        yield json.dumps({"anyOf": [{"const": n} for n in range(count)]})
        yield json.dumps({"properties": {f"p{n}": {"type": "null"} for n in range(count // 10)}})
        yield json.dumps({"type": "object", "required": [f"p{n}" for n in range(count)]})
        yield json.dumps({"patternProperties": {f"^p{n}": {} for n in range(count // 10)}})
    for value in (0, -1, 1, 10**6, 10**18, 10**400, 1.5, -0.0, 1e308, "1", None, True, [], {}):
        for keyword in ("minLength", "maxLength", "minItems", "maxItems", "minimum", "multipleOf"):
            kind = {"L": "string", "I": "array"}.get(keyword[3], "number")
            yield json.dumps({"type": kind, keyword: value})
    yield from (
        json.dumps({"$ref": reference, "$defs": {"a": {"$ref": "#/$defs/a"}}})
        for reference in (
            "#",
            "",
            "#/",
            "#/$defs/a",
            "#/$defs/b",
            "#/$defs/a/../a",
            "file:///etc/passwd",
            "http://127.0.0.1:1/x",
            "a" * 9000,
        )
    )
    yield from (
        json.dumps({"type": "string", "minLength": 5, "maxLength": 4}),
        json.dumps({"type": "integer", "minimum": 5, "maximum": 4}),
        json.dumps({"type": "array", "minItems": 9, "maxItems": 2, "items": False}),
        json.dumps({"allOf": [{"type": "string"}, {"type": "integer"}]}),
        json.dumps({"type": "string", "format": "no-such-format"}),
        json.dumps({"type": "string", "pattern": "(" * 3000}),
        json.dumps({"type": "string", "pattern": "^((((a{1,50}){1,50}){1,50}){1,50})$"}),
        json.dumps({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        json.dumps({"x-guidance": {"lenient": True, "whitespace_pattern": "("}}),
        '{"enum":["\\ud800"]}',
        '{"enum":["\\u0000","\\uffff"]}',
        '{"type":"object","type":"array"}',
        '{"const":' + "9" * 5000 + "}",
        '{"const":NaN}',
        "nul",
        "",
        "\x00",
        "true",
        "false",
        "null",
        "1e999999",
        '"' + "a" * 100_000,
    )


def _doubling(depth: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        f"n{level}": {
            "type": "object",
            "properties": {key: {"$ref": f"#/$defs/n{level + 1}"} for key in "ab"},
            "required": ["a", "b"],
        }
        for level in range(depth)
    }
    definitions[f"n{depth}"] = {"type": "integer"}
    return {"$ref": "#/$defs/n0", "$defs": definitions}


def _merging(depth: int) -> dict[str, Any]:
    return {
        "allOf": [
            {"anyOf": [{"properties": {f"p{level}": {"const": n}}} for n in range(4)]}
            for level in range(depth)
        ]
    }


def _regexes() -> Iterator[str]:
    for count in (3, 30, 300, 3000, 60_000):
        yield f"a{{{count}}}"
        yield f"(a{{{count}}}){{{count}}}"
        yield f"(a|b)*a(a|b){{{count}}}"
        yield f"(.{{0,{count}}}x){{3}}"
        yield f"[\\p{{L}}\\p{{N}}]{{{count}}}[^\\p{{L}}]{{{count}}}"
        yield "(" * count + "a" + ")" * count
        yield "|".join(f"w{n}x{n * 7}" for n in range(min(count, 20_000)))
    yield from ("(a+)+b", "(a|a)*c", "((a*)*)*", "(x+x+)+y", "(.*)*" * 20, "(a?){40}a{40}")
    yield from ("(?!a)b", "(?<=a)b", "(a)\\1", "\\b", "a$b", "^^a", "(?R)", "(?P<n>a)(?P=n)", "\\Z")
    yield from ("[", "]", "(", "{", "a{2,1}", "*", "+?", "\\", "[z-a]", "(?i", "\x00", "", "\\xff")
    yield from ("[^\\x00-\\x{10ffff}]", "\\p{Nope}", "[[:nope:]]", "é{9}", "🙂|日", "\\u{d800}")


def _grammars() -> Iterator[str]:
    for count in (5, 50, 900, 20_000):
        yield "root ::= " + "(" * count + '"a"' + ")" * count
        yield (
            "root ::= r0\n"
            + "".join(f'r{n} ::= "a" r{n + 1} | r{n + 1}\n' for n in range(count))
            + f'r{count} ::= "b"'
        )
        yield f'root ::= "a"{{{count}}} "b"{{0,{count}}}'
        yield "root ::= " + " | ".join(f'"w{n}"' for n in range(count))
    yield from (
        "",
        "root",
        "root ::=",
        "root ::= root",
        'root ::= root "a" | root root | ""',
        'root ::= "a" root',
        "root ::= missing",
        'other ::= "a"',
        'root ::= "a\n',
        "root ::= [",
        "root ::= [z-a]",
        'root ::= "\\xff"',
        "start: /(/",
        'start: "a"* ~ 5',
        "%llguidance {}",
        "%import common.WORD\nstart: WORD",
        "start: @missing",
        'start: %json {"$ref":"#"}',
        "start: %regex { nothing }",
        "start: <|im_end|>",
        "start[max_tokens=0]: /a/",
        'start[capture, temperature=1e99]: "a"',
        "\x00",
    )


def _tags() -> Iterator[str]:
    good = {"begin": "<a>", "schema": {"type": "integer"}, "end": "</a>"}
    for change in (
        {},
        {"begin": ""},
        {"begin": 1},
        {"end": ""},
        {"end": "x" * 100_000},
        {"schema": False},
        {"schema": "{}"},
        {"schema": {"uniqueItems": True}},
        {"schema": {"x-guidance": {}}},
        {"more": 1},
    ):
        yield json.dumps({"structures": [{**good, **change}], "triggers": ["<"]})
    yield json.dumps({"structures": [good] * 2000, "triggers": ["<a"]})
    for triggers in ([], [""], ["b"], [1], "<a", None, ["<|im_end|>"]):
        yield json.dumps({"structures": [good], "triggers": triggers})
    yield from ("{}", "[]", "", "1", '{"type":"structural_tag","format":{"type":"any_text"}}')
