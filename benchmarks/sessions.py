"""Coding agents against engine after engine: closed-loop sessions over HTTP, A B A B.

Each user is a session: a system prompt that all share (some 1,500 tokens), then turns of 150 to 900
new tokens, each answered with 96 tokens before the next is sent, as an agent does whose tools are
instant. Every engine is started anew for each run, as a user would start it, and gets the same
sessions. Printed and recorded, by users: output tokens a minute, tokens a second that a user sees
from an answer's first token to its last (median), and the time to the first token (median, p99).
Checked: every turn was answered with the tokens it asked for.

    python benchmarks/sessions.py [--model qwen2.5-coder-0.5b] [--users 1 4 8] [--pairs 3]

Appends one line a model to benchmarks/history/sessions.jsonl.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import numpy as np
from engines.environments import FOLDER, llama_tool, python
from openai import AsyncOpenAI
from peers import PEERS, hf_folder, openvino_folder
from rich.console import Console
from rich.table import Table

from tokenspeed import __version__, loader

ENGINES = Path(__file__).parent / "engines"
HISTORY = Path(__file__).parent / "history" / "sessions.jsonl"
WORDS = [
    "def",
    "class",
    "return",
    "import",
    "self",
    "None",
    "True",
    "for",
    "in",
    "if",
    "else",
    "while",
    "with",
    "open",
    "read",
    "write",
    "path",
    "list",
    "dict",
    "set",
    "index",
    "value",
    "token",
    "page",
    "cache",
    "step",
    "error",
    "test",
    "assert",
    "raise",
    "file",
    "line",
    "buffer",
    "parse",
    "format",
    "request",
    "response",
    "stream",
    "batch",
    "queue",
    "lock",
    "thread",
    "wait",
    "send",
    "model",
    "layer",
    "weight",
]
SYSTEM_WORDS = 1100
OUTPUT_TOKENS = 96
CONTEXT = 12288
START_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Turn:
    """One answer: when it was asked for, and when its first and last token came."""

    asked_s: float
    first_s: float
    last_s: float


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def sessions(users: int) -> list[list[str]]:
    """The turns of each user; the same for every engine."""
    draw = random.Random(7)
    return [
        [words(draw, draw.randint(110, 650)) for _ in range(draw.randint(4, 8))]
        for _ in range(users)
    ]


def context(name: str) -> int:
    return 8192 if name == "smollm2-135m" else CONTEXT


def command(engine: str, name: str, users: int, port: int, threads: int) -> list[str]:
    files = loader.resolve(name)
    if engine == "tokenspeed":
        return [
            *(str(python(engine).parent / "tokenspeed"), "serve", name, "--port", str(port)),
            *(
                "--threads",
                str(threads),
                "--max-context",
                str(context(name)),
            ),
            *("--tps-floor", "0"),
        ]
    if engine == "llama.cpp":
        return [
            *(str(llama_tool("llama-server")), "-m", str(files.path), "--port", str(port)),
            *("--host", "127.0.0.1", "-t", str(threads), "-fa", "on", "-np", str(users)),
            *("-c", str(CONTEXT * users), "--no-webui", "-ub", "512"),
        ]
    if engine == "vllm":
        return [
            *(str(python("vllm")), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(hf_folder(files, name)), "--served-model-name", name),
            *(
                "--dtype",
                "bfloat16",
                "--max-model-len",
                str(context(name)),
                "--max-num-seqs",
                "16",
            ),
            *("--host", "127.0.0.1", "--port", str(port), "--enable-prompt-tokens-details"),
        ]
    folder = openvino_folder(files, name, engine.partition("-")[2])
    script = str(ENGINES / "openvino_server.py")
    return [str(python("openvino")), script, str(folder), str(port), str(threads)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Server:
    """An engine that answers on a port, until the block is left."""

    def __init__(self, engine: str, name: str, users: int, threads: int) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._command = command(engine, name, users, port, threads)
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "3",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        }
        self._environment = {**os.environ, **(environment if engine == "vllm" else {})}
        self._log = FOLDER / f"server-{engine}.log"

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdout=self._log.open("w"),
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise SystemExit(f"{self._command[0]} ended; see {self._log}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise SystemExit(f"no answer within {START_TIMEOUT_S} s; see {self._log}")

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


async def user(client: AsyncOpenAI, name: str, system: str, turns: list[str]) -> list[Turn]:
    messages: list[dict[str, str]] = [{"role": "system", "content": system}]
    found = []
    for text in turns:
        messages.append({"role": "user", "content": text})
        asked_s = time.perf_counter()
        stream = await client.chat.completions.create(
            model=name,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=OUTPUT_TOKENS,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "min_tokens": OUTPUT_TOKENS},
        )
        answer, times_s, counted = "", [], None
        async for chunk in stream:
            if chunk.usage is not None:
                counted = chunk.usage.completion_tokens
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                times_s.append(time.perf_counter())
                answer += piece
        assert counted == OUTPUT_TOKENS, f"asked for {OUTPUT_TOKENS} tokens, got {counted}"
        found.append(Turn(asked_s, times_s[0], times_s[-1]))
        messages.append({"role": "assistant", "content": answer})
    return found


async def drive(url: str, name: str, users: int) -> dict[str, float]:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800, max_retries=3)
    draw = random.Random(3)
    # A prompt of its own warms the engine, and leaves nothing that the sessions could use. Some
    # answer on their health route before they know their tokenizer.
    patient = client.with_options(max_retries=10)
    await user(patient, name, words(draw, 20), [words(draw, 20)])
    system = words(draw, SYSTEM_WORDS)
    start_s = time.perf_counter()
    runs = await asyncio.gather(*(user(client, name, system, turns) for turns in sessions(users)))
    took_s = time.perf_counter() - start_s
    turns = [turn for run in runs for turn in run]
    waits = [turn.first_s - turn.asked_s for turn in turns]
    rates = [(OUTPUT_TOKENS - 1) / (turn.last_s - turn.first_s) for turn in turns]
    await client.close()
    return {
        "output_tokens_per_min": len(turns) * OUTPUT_TOKENS / took_s * 60,
        "user_tokens_per_s": statistics.median(rates),
        "first_token_s": statistics.median(waits),
        "first_token_p99_s": float(np.percentile(waits, 99)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=sorted(PEERS))
    parser.add_argument("--users", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engines", nargs="*", help="peers; all that suit the model by default")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in options.model or ["smollm2-135m", "qwen2.5-coder-0.5b"]:
        peers = list(options.engines if options.engines is not None else PEERS[name])
        engines = ["tokenspeed", *peers]
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        for users in options.users:
            of = found.setdefault(str(users), {engine: [] for engine in engines})
            for _ in range(options.pairs):
                for engine in engines:
                    with Server(engine, name, users, options.threads) as server:
                        of[engine].append(asyncio.run(drive(server.url, name, users)))
                    print(f"  {name}, {users} users, {engine}: {of[engine][-1]}", flush=True)
        table = Table(title=f"{name}: median of {options.pairs} runs; ours over theirs")
        for column in ("users", "engine", "output tokens a minute", "TPS", "TTFT", "TTFT p99"):
            table.add_column(column)
        for users, of in found.items():
            for engine, runs in of.items():
                cells = []
                for figure in runs[0]:
                    median = statistics.median(run[figure] for run in runs)
                    pairs = zip(of["tokenspeed"], runs, strict=True)
                    ratio = statistics.median(a[figure] / b[figure] for a, b in pairs)
                    cells.append(f"{median:.2f}  x{ratio:.2f}")
                table.add_row(users, engine, *cells)
        Console(width=160).print(table)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": __version__,
            "model": name,
            "threads": options.threads,
            "output_tokens": OUTPUT_TOKENS,
            "machine": platform.processor() or platform.machine(),
            "python": sys.version.split()[0],
            "runs": found,
        }
        with HISTORY.open("a") as history:
            print(json.dumps(line), file=history)


if __name__ == "__main__":
    main()
