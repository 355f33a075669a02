"""How much of a conversation that comes back is served from the cache, beside an ideal cache.

    python benchmarks/history_reuse.py FILE [--model MODEL] [--sessions 20] [--temperatures 0 1]

A server as a user starts it, with token-exact history and without, one after the other. Recorded
sessions of coding agents are replayed through the gateway, one session after the other, with the
model's own answers sent back as the history, cut to the context. Of every turn but a session's
first, the cached tokens that the usage tells are put beside what an ideal cache would have had:

    the longest beginning, in bytes, that the text of this prompt as the template renders it has in
    common with the text of any earlier turn of the session, prompt and answer as the client got
    them; of the tokens that the gateway encodes this prompt to, those that lie whole within it, but
    never the prompt's last; rounded down to whole pages.

Such a cache reuses what any cache of pages of exact prefixes can, and some it cannot: the answer's
last token, which was never fed. That the text rendered here is the gateway's is checked by the
count of its tokens. Appends to benchmarks/history/history_reuse.jsonl.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenspeed import loader
from tokenspeed.bench.sessions import Session, cut, read_sessions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.serving import Serve  # noqa: E402

PAGE_SIZE = 32


def common_bytes(one: bytes, other: bytes) -> int:
    """How many bytes two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def ideal_tokens(tokenizer: loader.Tokenizer, prompt: str, earlier: list[bytes]) -> tuple[int, int]:
    """Tokens of a rendered prompt, and how many of them an ideal cache has."""
    ids = tokenizer.encode(prompt)
    data = prompt.encode()
    common = max((common_bytes(data, text) for text in earlier), default=0)
    count, end = 0, 0
    for token in ids[:-1]:
        end += len(tokenizer.bytes_of(token))
        if end > common:
            break
        count += 1
    return len(ids), count // PAGE_SIZE * PAGE_SIZE


def replay(
    server: Serve, tokenizer: loader.Tokenizer, session: Session, options: dict[str, Any]
) -> list[dict[str, int]]:
    """What each turn of a session had: tokens of its prompt, cached ones, those of an ideal."""
    messages: list[dict[str, str]] = []
    earlier: list[bytes] = []
    turns = []
    for number, turn in enumerate(session.turns):
        messages += [{"role": entry.role, "content": entry.content} for entry in turn.messages]
        prompt = tokenizer.render_chat(messages)
        count, ideal = ideal_tokens(tokenizer, prompt, earlier)
        if count + options["max_tokens"] > options["context_max"]:
            break
        begin_s = time.perf_counter()
        status, body = server.post(
            "/v1/chat/completions",
            {
                "model": server.get("/v1/models")["data"][0]["id"],
                "messages": messages,
                "max_tokens": options["max_tokens"],
                "temperature": options["temperature"],
                "seed": number,
            },
        )
        took_s = time.perf_counter() - begin_s
        if status != 200:
            raise SystemExit(f"HTTP {status}: {body}")
        usage = body["usage"]
        if usage["prompt_tokens"] != count:
            raise SystemExit(f"the gateway counts {usage['prompt_tokens']} tokens, not {count}")
        answer = body["choices"][0]["message"]["content"] or ""
        earlier.append((prompt + answer).encode())
        messages.append({"role": "assistant", "content": answer})
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        turns.append(
            {"prompt": count, "cached": cached, "ideal": ideal, "took_ms": round(1000 * took_s)}
        )
    return turns


def main() -> int:
    """Replay, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--turns", type=int, default=None)
    parser.add_argument("--max-context", type=int, default=8192)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    arguments = parser.parse_args()
    console = Console()
    workload = read_sessions(arguments.file, limit=arguments.sessions)
    workload = cut(workload, turns_max=arguments.turns, output_tokens=arguments.output_tokens)
    tokenizer = loader.Tokenizer(loader.resolve(arguments.model).tokenizer_dir)
    results = []
    for history in ("--token-exact-history", "--no-token-exact-history"):
        for temperature in arguments.temperatures:
            options = {
                "max_tokens": arguments.output_tokens,
                "temperature": temperature,
                "context_max": arguments.max_context,
            }
            flags = ("--max-context", str(arguments.max_context), "--kv-cache-memory", "1GiB")
            flags += ("--tps-floor", "0", "--queue-timeout", "0", history)
            with (
                tempfile.TemporaryDirectory() as folder,
                Serve(Path(folder) / "log", *flags, model=arguments.model) as server,
            ):
                sessions = [
                    replay(server, tokenizer, session, options) for session in workload.sessions
                ]
                with server.servicer() as channel:
                    counters = server.counters(channel)
            later = [turn for turns in sessions for turn in turns[1:]]
            totals = {
                name: sum(turn[name] for turn in later) for name in ("prompt", "cached", "ideal")
            }
            short = sum(turn["cached"] < 0.99 * turn["ideal"] for turn in later)
            line = {
                "history": history,
                "temperature": temperature,
                "sessions": sum(map(bool, sessions)),
                "turns": len(later),
                **totals,
                "of_ideal": totals["cached"] / max(totals["ideal"], 1),
                "turns_below_99": short,
                "computed": totals["prompt"] - totals["cached"],
                "seconds": sum(turn["took_ms"] for turn in later) / 1000,
                "counters": {
                    name: value for name, value in counters.items() if name.startswith("history_")
                },
            }
            results.append(line)
            console.print(
                f"{history} at temperature {temperature:g}: {totals['cached']} of "
                f"{totals['ideal']} tokens of an ideal cache, {100 * line['of_ideal']:.2f}%; "
                f"{short} of {len(later)} turns below 99%; {line['computed']} tokens computed; "
                f"{line['seconds']:.0f} s; {line['counters']}",
                soft_wrap=True,
            )
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{
            name: str(value) if name == "file" else value for name, value in vars(arguments).items()
        },
        "file": arguments.file.name,
        "results": results,
    }
    with (ROOT / "benchmarks/history/history_reuse.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
