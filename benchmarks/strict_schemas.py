"""How many answers of a served model are valid under strict schemas, and what constraints cost.

    python benchmarks/strict_schemas.py [--model MODEL] [--answers 500] [--clients 8]

A server as a user starts it; OpenAI's client asks for answers at temperature 1, each under one of
six strict schemas (tools, required and named, among them), each with a seed of its own. Every
answer is parsed and checked by a validator of this file, which knows just these schemas' keywords
and shares no code with the engine. An answer that was cut by its length counts as invalid, which
is why the schemas bound what could go on for ever: texts, lists, and the digits of numbers. Then
the same prompts without constraints and with ones that allow everything, in turn (A B A B): tokens
a second of all clients. Appends to benchmarks/history/strict_schemas.jsonl.
"""

import argparse
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.serving import Serve  # noqa: E402

MAX_TOKENS = 400
SPEED_TOKENS = 64


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(most: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": most}


SCHEMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "person": (
        "Invent a person.",
        _object(
            name=_text(40),
            age={"type": "integer", "minimum": 0, "maximum": 120},
            tags={"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        ),
    ),
    "steps": (
        "Explain how to solve 8x + 7 = -23, in steps.",
        _object(
            steps={
                "type": "array",
                "items": _object(explanation=_text(80), output=_text(40)),
                "minItems": 1,
                "maxItems": 4,
            },
            final_answer=_text(40),
        ),
    ),
    "tree": (
        "Describe the folders of a small project as a tree.",
        {
            "$ref": "#/$defs/folder",
            "$defs": {
                "folder": _object(
                    name={"type": "string", "pattern": "^[a-z_]{1,12}$"},
                    folders={"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 3},
                ),
                "leaf": _object(
                    name={"type": "string", "pattern": "^[a-z_]{1,12}$"},
                    files={"type": "array", "items": _text(24), "maxItems": 3},
                ),
            },
        },
    ),
    "choice": (
        "Is the sky green? Give a verdict and a confidence.",
        _object(
            verdict={"enum": ["yes", "no", "unsure", None]},
            confidence_percent={"type": "integer", "minimum": 0, "maximum": 100},
            why={"anyOf": [_text(60), {"type": "null"}]},
        ),
    ),
}
TOOLS: dict[str, dict[str, Any]] = {
    "edit_file": _object(
        path=_text(40), line={"type": "integer", "minimum": 1, "maximum": 999}, text=_text(60)
    ),
    "run": _object(command=_text(60), timeout_s={"type": "integer", "minimum": 1, "maximum": 600}),
}


def valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value satisfies a schema of this file."""
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema:
        return any(valid(value, option, root) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "object":
            properties = schema["properties"]
            return (
                isinstance(value, dict)
                and value.keys() == properties.keys()
                and all(valid(value[name], properties[name], root) for name in properties)
            )
        case "array":
            return (
                isinstance(value, list)
                and schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
                and all(valid(item, schema["items"], root) for item in value)
            )
        case "string":
            return (
                isinstance(value, str)
                and len(value) <= schema.get("maxLength", 1 << 30)
                and re.search(schema.get("pattern", ""), value) is not None
            )
        case "null":
            return value is None
        case _:
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]


def ask(client: openai.OpenAI, model: str, number: int) -> tuple[str, bool, str]:
    """One answer: its kind, whether it is valid, and what it was."""
    kinds = [*SCHEMAS, "required tool", "named tool"]
    kind = kinds[number % len(kinds)]
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": MAX_TOKENS, "seed": number}
    if kind in SCHEMAS:
        prompt, schema = SCHEMAS[kind]
        strict = {"name": kind, "schema": schema, "strict": True}
        options["response_format"] = {"type": "json_schema", "json_schema": strict}
    else:
        prompt = "Change line 3 of main.py to print the date."
        named = {"type": "function", "function": {"name": "edit_file"}}
        options["tool_choice"] = "required" if kind == "required tool" else named
        options["tools"] = [
            {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
            for name, schema in TOOLS.items()
        ]
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], **options
    )
    choice = answer.choices[0]
    try:
        if kind in SCHEMAS:
            text = choice.message.content or ""
            good = choice.finish_reason == "stop" and valid(json.loads(text), schema, schema)
        else:
            calls = choice.message.tool_calls or []
            text = json.dumps([(call.function.name, call.function.arguments) for call in calls])
            good = bool(calls) and all(
                valid(json.loads(call.function.arguments), TOOLS[call.function.name], {})
                for call in calls
            )
    except (ValueError, KeyError):
        good = False
    return kind, good, f"{choice.finish_reason}: {text}"


def speed(client: openai.OpenAI, model: str, clients: int, *, confined: bool) -> float:
    """Tokens a second of all clients together."""
    extra: dict[str, Any] = {"ignore_eos": True}
    if confined:
        extra["regex"] = "(.|\\n)*"

    def one(number: int) -> int:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Tell me of the number {number}."}],
            max_tokens=SPEED_TOKENS,
            temperature=0.0,
            extra_body=extra,
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(clients) as pool:
        begin_s = time.perf_counter()
        tokens = sum(pool.map(one, range(clients)))
        return tokens / (time.perf_counter() - begin_s)


def main() -> int:
    """Ask, check, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    console = Console()
    good: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--tps-floor", "0", "--queue-timeout", "0")
        serve = Serve(Path(folder) / "log", *flags, model=arguments.model)
        with serve as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            with ThreadPoolExecutor(arguments.clients) as pool:
                begin_s = time.perf_counter()
                for kind, right, text in pool.map(
                    lambda number: ask(client, arguments.model, number), range(arguments.answers)
                ):
                    good.setdefault(kind, []).append(right)
                    if not right:
                        console.print(kind, text)
                took_s = time.perf_counter() - begin_s
            speeds: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(5):
                for confined in (False, True):
                    speeds[confined].append(
                        speed(client, arguments.model, arguments.clients, confined=confined)
                    )
    for kind, answers in good.items():
        console.print(f"{kind}: {sum(answers)} of {len(answers)} valid")
    total = sum(map(sum, good.values()))
    console.print(f"all: {total} of {arguments.answers} valid, in {took_s:.0f} s")
    medians = {
        name: statistics.median(speeds[confined][1:])
        for name, confined in (("free", False), ("confined", True))
    }
    console.print(", ".join(f"{name} {value:.0f} tokens/s" for name, value in medians.items()))
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "model": arguments.model,
        "python": platform.python_version(),
        "clients": arguments.clients,
        "valid": {kind: [sum(answers), len(answers)] for kind, answers in good.items()},
        "tokens_per_s": {str(confined): values for confined, values in speeds.items()},
    }
    with (ROOT / "benchmarks/history/strict_schemas.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return 0 if total == arguments.answers else 1


if __name__ == "__main__":
    sys.exit(main())
