"""How much of a conversation that comes back is served from the cache, beside an ideal cache.

    python benchmarks/history_reuse.py FILE [--model MODEL] [--sessions 20] [--temperatures 0 1]

Servers as a user starts them, one for each temperature with token-exact history and one without,
side by side. Recorded sessions of coding agents are replayed through the gateway, each session on
all of the servers at once before the next one, with the model's own answers sent back as the
history, cut to the context. Of every turn but a session's first, the cached tokens that
the usage tells are put beside what an ideal cache would have had:

    the longest beginning, in bytes, that the text of this prompt as the template renders it has in
    common with the text of any earlier turn of the session, prompt and answer as the client got
    them; of the tokens that the gateway encodes this prompt to, those that lie whole within it, but
    never the prompt's last; rounded down to whole pages.

Such a cache reuses what any cache of pages of exact prefixes can, and some it cannot: the answer's
last token, which was never fed. That the text rendered here is the gateway's is checked by the
count of its tokens. With `--minutes` no session begins later than that, and what is reported are
the sessions that every server had. With `--state FILE` each session is appended to that file as it
ends on a server, and what is in the file is not run again: a run that was broken off goes on.
Appends to benchmarks/history/history_reuse.jsonl.
"""

import argparse
import contextlib
import dataclasses
import json
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from rich.console import Console

from tokenspeed import loader
from tokenspeed.bench.sessions import Session, cut, read_sessions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.serving import Serve  # noqa: E402

PAGE_SIZE = 32
COUNTERS = ("history_prompts", "history_replaced_tokens")

# Temperature, and the flag that turns token-exact history on or off.
Kind = tuple[float, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """A session on one server: each turn's tokens, and by how much the counters grew."""

    turns: list[dict[str, int]]
    counters: dict[str, float]


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
    client: httpx.Client,
    tokenizer: loader.Tokenizer,
    session: Session,
    *,
    temperature: float,
    output_tokens: int,
    context_max: int,
) -> list[dict[str, int]]:
    """What each turn of a session had: tokens of its prompt, cached ones, those of an ideal."""
    model = client.get("/v1/models").json()["data"][0]["id"]
    messages: list[dict[str, str]] = []
    earlier: list[bytes] = []
    turns = []
    for number, turn in enumerate(session.turns):
        messages += [{"role": entry.role, "content": entry.content} for entry in turn.messages]
        prompt = tokenizer.render_chat(messages)
        count, ideal = ideal_tokens(tokenizer, prompt, earlier)
        if count + output_tokens > context_max:
            break
        begin_s = time.perf_counter()
        reply = client.post(
            "/v1/chat/completions",
            json={
                "model": model,
                "messages": messages,
                "max_tokens": output_tokens,
                "temperature": temperature,
                "seed": number,
            },
        )
        took_s = time.perf_counter() - begin_s
        reply.raise_for_status()
        body = reply.json()
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


def sums(sessions: list[list[dict[str, int]]]) -> dict[str, int]:
    """Tokens of all turns but the first of each session."""
    later = [turn for turns in sessions for turn in turns[1:]]
    return {name: sum(turn[name] for turn in later) for name in ("prompt", "cached", "ideal")}


def report(
    arguments: argparse.Namespace, console: Console, kind: Kind, done: dict[str, Done]
) -> None:
    """Print and append what the turns after the first of each session had."""
    temperature, history = kind
    sessions = [session.turns for session in done.values()]
    later = [turn for turns in sessions for turn in turns[1:]]
    prompt, cached, ideal = sums(sessions).values()
    short = sum(turn["cached"] < 0.99 * turn["ideal"] for turn in later)
    took_s = sum(turn["took_ms"] for turn in later) / 1000
    remembered = {
        name: sum(session.counters[name] for session in done.values()) for name in COUNTERS
    }
    console.print(
        f"{arguments.model} at temperature {temperature:g}, {history}: {cached} of {ideal} tokens "
        f"of an ideal cache, {100 * cached / max(ideal, 1):.3f}%; {short} of {len(later)} turns "
        f"below 99%; {prompt - cached} of {prompt} prompt tokens computed; {took_s:.0f} s; "
        f"{remembered}",
        soft_wrap=True,
    )
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: value for name, value in vars(arguments).items() if name != "state"},
        "file": arguments.file.name,
        "temperature": temperature,
        "history": history,
        "sessions": sum(map(bool, sessions)),
        "longest_prompts": [
            max((turn["prompt"] for turn in turns), default=0) for turns in sessions
        ],
        "turns_after_the_first": len(later),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "ideal_tokens": ideal,
        "turns_below_99_percent": short,
        "seconds": took_s,
        "counters": remembered,
    }
    with (ROOT / "benchmarks/history/history_reuse.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def run(
    arguments: argparse.Namespace,
    tokenizer: loader.Tokenizer,
    session: Session,
    kind: Kind,
    server: Serve,
) -> Done:
    """Replay a session on a server, and append it to the state."""
    with (
        server.servicer() as channel,
        httpx.Client(base_url=server.url, timeout=None, trust_env=False) as client,
    ):
        before = server.counters(channel)
        turns = replay(
            client,
            tokenizer,
            session,
            temperature=kind[0],
            output_tokens=arguments.output_tokens,
            context_max=arguments.max_context,
        )
        after = server.counters(channel)
    done = Done(turns, {name: after.get(name, 0.0) - before.get(name, 0.0) for name in COUNTERS})
    if arguments.state is not None:
        with arguments.state.open("a") as file:
            line = {"session": session.name, "kind": kind, **dataclasses.asdict(done)}
            file.write(json.dumps(line) + "\n")
    return done


def resume(state: Path | None) -> dict[Kind, dict[str, Done]]:
    """The sessions that a state file has, by kind and name."""
    found: dict[Kind, dict[str, Done]] = {}
    if state is not None and state.exists():
        for line in map(json.loads, state.read_text().splitlines()):
            temperature, history = line["kind"]
            done = Done(line["turns"], line["counters"])
            found.setdefault((temperature, history), {})[line["session"]] = done
    return found


def serve(arguments: argparse.Namespace, log: Path, history: str) -> Serve:
    """A server to be entered: one user at a time, who may wait for as long as it takes."""
    flags = ["--max-context", str(arguments.max_context), "--kv-cache-memory", "1GiB", history]
    flags += ["--tps-floor", "0", "--queue-timeout", "0"]
    if arguments.threads is not None:
        flags += ["--threads", str(arguments.threads)]
    return Serve(log, *flags, model=arguments.model)


def main() -> int:
    """Replay, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--skip", type=int, default=0, help="of these sessions the first so many")
    parser.add_argument("--turns", type=int, default=None)
    parser.add_argument("--max-context", type=int, default=32768)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--state", type=Path, default=None)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    arguments = parser.parse_args()
    console = Console()
    workload = read_sessions(arguments.file, limit=arguments.sessions)
    workload = cut(workload, turns_max=arguments.turns, output_tokens=arguments.output_tokens)
    # The shortest first: a run that is broken off leaves out as few as can be.
    sessions = sorted(
        workload.sessions[arguments.skip :],
        key=lambda session: sum(turn.new_tokens for turn in session.turns),
    )
    tokenizer = loader.Tokenizer(loader.resolve(arguments.model).tokenizer_dir)
    kinds: list[Kind] = [
        (temperature, history)
        for temperature in arguments.temperatures
        for history in ("--token-exact-history", "--no-token-exact-history")
    ]
    found = resume(arguments.state)
    done = {kind: found.get(kind, {}) for kind in kinds}
    begin_s = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as stack,
        ThreadPoolExecutor(len(kinds)) as pool,
    ):
        servers = {
            kind: stack.enter_context(serve(arguments, Path(folder) / f"log{number}", kind[1]))
            for number, kind in enumerate(kinds)
        }
        for session in sessions:
            spent_minutes = (time.monotonic() - begin_s) / 60
            if arguments.minutes is not None and spent_minutes > arguments.minutes:
                break
            running = {
                kind: pool.submit(run, arguments, tokenizer, session, kind, server)
                for kind, server in servers.items()
                if session.name not in done[kind]
            }
            for kind, future in running.items():
                done[kind][session.name] = future.result()
                told = sums([done[kind][session.name].turns])
                console.print(f"{session.name} {kind}: {told}", soft_wrap=True)
    everywhere = [
        session.name for session in sessions if all(session.name in done[kind] for kind in kinds)
    ]
    for kind in kinds:
        report(arguments, console, kind, {name: done[kind][name] for name in everywhere})
    return 0


if __name__ == "__main__":
    sys.exit(main())
