"""A scripted coding-agent session of six turns with one tool, through the official openai client.

Starts `tokenspeed serve`, plays the session (streaming), prints the conversation and, per turn,
prompt tokens, cached tokens, time to first token and tokens a second, and stops the server.
Which command runs on which turn is scripted, since the default model is too small to choose; the
commands really run, the answers are the model's own and are sent back as history. Exits with 1
unless, from turn 2 on, the cache gave every full page of the previous context.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.table import Table

PAGE_SIZE = 32
TOOL = {
    "type": "function",
    "function": {
        "name": "run_command",
        "description": "Run a command in the project folder and read what it prints.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
        },
    },
}
SYSTEM = (
    "You are a coding agent. You work in a small Python project and have one tool, run_command. "
    "Say in one or two sentences what you will do next."
)
TASK = "The tests of calc.py fail. Find the bug, mend it and run the tests again."
PROJECT = {
    "calc.py": "def add(a, b):\n    return a - b\n\n\ndef double(a):\n    return add(a, a)\n",
    "test_calc.py": (
        "import unittest\n\nfrom calc import add, double\n\n\n"
        "class TestCalc(unittest.TestCase):\n"
        "    def test_add(self):\n        self.assertEqual(add(2, 3), 5)\n\n"
        "    def test_double(self):\n        self.assertEqual(double(4), 8)\n"
    ),
}
MEND = "import pathlib; f = pathlib.Path('calc.py'); f.write_text(f.read_text().replace('-', '+'))"
COMMANDS: list[list[str]] = [
    ["ls"],
    ["cat", "calc.py", "test_calc.py"],
    [sys.executable, "-m", "unittest", "-q"],
    [sys.executable, "-c", MEND],
    [sys.executable, "-m", "unittest", "-q"],
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one turn cost."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    ttft_s: float
    tps: float


def main() -> int:
    """Play the session. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="model to serve")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens of an answer")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    with serving(arguments.model) as url, tempfile.TemporaryDirectory() as folder:
        for name, text in PROJECT.items():
            (Path(folder) / name).write_text(text)
        client = openai.OpenAI(base_url=url, api_key="none")
        model = client.models.list().data[0].id
        turns = play(client, model, Path(folder), arguments.max_tokens, console)
    return report(turns, console)


def play(
    client: openai.OpenAI, model: str, folder: Path, max_tokens: int, console: Console
) -> list[Turn]:
    """Six turns, each answer streamed to the console."""
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": TASK},
    ]
    console.print(f"[bold]user[/] {TASK}")
    turns = []
    for index in range(len(COMMANDS) + 1):
        console.print("[bold green]assistant[/] ", end="")
        text, turn = answer(client, model, messages, max_tokens, console)
        turns.append(turn)
        if index == len(COMMANDS):
            break
        command = COMMANDS[index]
        shown = " ".join(["python", *command[1:]] if command[0] == sys.executable else command)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        output = re.sub(r" in [0-9.]+s", "", done.stdout + done.stderr) or "(no output)"
        call = {
            "id": f"call_{index}",
            "type": "function",
            "function": {"name": "run_command", "arguments": json.dumps({"command": shown})},
        }
        messages.append({"role": "assistant", "content": text, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": output})
        console.print(f"[bold yellow]tool[/] $ {shown}\n{output.rstrip()}", markup=True)
    return turns


def answer(
    client: openai.OpenAI, model: str, messages: list[Any], max_tokens: int, console: Console
) -> tuple[str, Turn]:
    """One streamed answer and what it cost."""
    start_s = time.perf_counter()
    first_s = start_s
    pieces: list[str] = []
    usage = None
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=[TOOL],  # type: ignore[list-item]
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage is not None:
            usage = chunk.usage
        for choice in chunk.choices:
            if choice.delta.content:
                if not pieces:
                    first_s = time.perf_counter()
                pieces.append(choice.delta.content)
                console.print(choice.delta.content, end="", markup=False)
    end_s = time.perf_counter()
    console.print()
    assert usage is not None
    details = usage.prompt_tokens_details
    return "".join(pieces), Turn(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
        ttft_s=first_s - start_s,
        tps=(usage.completion_tokens - 1) / max(end_s - first_s, 1e-9),
    )


def report(turns: list[Turn], console: Console) -> int:
    """The table, and whether the cache gave all it could."""
    table = Table("turn", "prompt tokens", "cached tokens", "full pages before", "TTFT", "TPS")
    missed = 0
    expected = 0
    for number, turn in enumerate(turns, 1):
        missed += turn.cached_tokens < expected
        table.add_row(
            str(number),
            str(turn.prompt_tokens),
            str(turn.cached_tokens),
            str(expected),
            f"{turn.ttft_s * 1000:.0f} ms",
            f"{turn.tps:.1f}",
        )
        # The last sampled token is never fed back, so its KV does not exist.
        context = turn.prompt_tokens + turn.completion_tokens - 1
        expected = context // PAGE_SIZE * PAGE_SIZE
    console.print(table)
    if missed:
        console.print(f"[red]{missed} turns missed full pages of the context before them[/]")
        return 1
    console.print("From turn 2 on, the cache gave every full page of the previous context.")
    return 0


@contextmanager
def serving(model: str) -> Iterator[str]:
    """A served model's base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = str(Path(sys.executable).with_name("tokenspeed"))
    command = [program, "serve", model, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            print(line, end="", flush=True)
            if (found := re.search(r"http://\S+/v1", line)) is not None:
                break
        else:
            raise SystemExit("the server did not start")
        yield found.group()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
