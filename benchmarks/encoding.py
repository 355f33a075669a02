"""What the gateway spends on a conversation that grows, with its cache of encodings and without.

    python benchmarks/encoding.py FILE [--model MODEL] [--tokens 50000]

The real gateway before a servicer that answers with one token and has no engine. The recorded
sessions of a file are put behind each other to one conversation, which is sent turn by turn until
its prompt has so many tokens. Printed: CPU time of the gateway's process for a turn (HTTP,
template, encoding, gRPC), the mean of the turns of each length, since the kernel counts it in
hundredths of a second. Every prompt's tokens must be those of the tokenizer's own encoding, or the
run ends. Then what token-exact history takes for the longest prompt, least CPU time of many: to
recall it where all but its end was served with each tenth token in single characters, and to
remember it with an answer. Appends to benchmarks/history/encoding.jsonl.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import uvloop
from rich.console import Console

from tokenspeed import loader
from tokenspeed.bench.sessions import read_sessions
from tokenspeed.entrypoint.history import TokenHistory
from tokenspeed.entrypoint.spelling import TokenSpelling

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.recording_gateway import recording_gateway  # noqa: E402

BUCKET_TOKENS = 10_000
ANSWER = "THOUGHT: the file has to be read first.\n\n```bash\nsed -n '1,80p' setup.py\n```"


def conversations(path: Path) -> list[list[dict[str, str]]]:
    """The prompts of one long conversation."""
    history: list[dict[str, str]] = []
    prompts = []
    for session in read_sessions(path).sessions:
        for turn in session.turns:
            history += [
                {"role": "user", "content": entry.content}
                for entry in turn.messages
                if entry.role == "user"
            ]
            prompts.append(list(history))
            history.append({"role": "assistant", "content": ANSWER})
    return prompts


def least_ms(call: Callable[[], object]) -> float:
    """Least CPU time of many calls."""
    times_s = []
    for _ in range(30):
        begin_s = time.process_time()
        call()
        times_s.append(time.process_time() - begin_s)
    return 1000 * min(times_s)


def history_ms(tokenizer: loader.Tokenizer, ids: list[int]) -> tuple[float, float]:
    """Milliseconds to recall a prompt and to remember it."""
    spelling = TokenSpelling(
        tokenizer.bytes_of, control=tokenizer.control_token_ids, vocab_size=tokenizer.vocab_size
    )
    memory = TokenHistory(spelling)
    served: list[int] = []
    for place, token in enumerate(ids[:-200]):
        text = tokenizer.bytes_of(token)
        apart = place % 10 == 0 and text.isascii() and token not in tokenizer.control_token_ids
        served += [tokenizer.encode(chr(byte))[0] for byte in text] if apart else [token]
    memory.remember(
        memory.recall(np.array(served[:-100]), tenant=None, tokens_max=1 << 30), served[-100:]
    )
    sent = np.array(ids)
    prompt = memory.recall(sent, tenant=None, tokens_max=1 << 30)
    assert len(prompt.ids) == len(served) + 200
    assert tokenizer.decode(prompt.ids.tolist()) == tokenizer.decode(ids)
    recall = least_ms(lambda: memory.recall(sent, tenant=None, tokens_max=1 << 30))
    return recall, least_ms(lambda: memory.remember(prompt, ids[:200]))


async def measure(
    tokenizer_dir: Path,
    prompts: list[list[dict[str, str]]],
    expected: list[list[int]],
    *,
    cached: bool,
) -> dict[int, float]:
    """Milliseconds of CPU of a turn, by the prompt's length."""
    costs_ms = defaultdict(list)
    async with recording_gateway(tokenizer_dir, encoding_cache=cached) as gateway:
        process = psutil.Process(gateway.pid)
        for prompt, ids in zip(prompts, expected, strict=True):
            before = process.cpu_times()
            if await gateway.encode(prompt) != ids:
                raise SystemExit(f"the gateway encodes {len(ids)} tokens to others")
            after = process.cpu_times()
            spent_s = after.user + after.system - before.user - before.system
            costs_ms[len(ids) // BUCKET_TOKENS * BUCKET_TOKENS].append(1000 * spent_s)
    return {length: statistics.mean(values) for length, values in sorted(costs_ms.items())}


async def main() -> int:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--tokens", type=int, default=50_000)
    arguments = parser.parse_args()
    folder = loader.resolve(arguments.model).tokenizer_dir
    tokenizer = loader.Tokenizer(folder)
    prompts, expected = [], []
    for prompt in conversations(arguments.file):
        ids = tokenizer.encode(tokenizer.render_chat(prompt))
        if len(ids) > arguments.tokens:
            break
        prompts.append(prompt)
        expected.append(ids)
    console = Console()
    console.print(f"{len(prompts)} turns to {len(expected[-1])} tokens")
    costs_ms = {}
    for cached in (False, True):
        costs_ms[cached] = await measure(folder, prompts, expected, cached=cached)
        shown = ", ".join(f"{length}: {cost:.1f}" for length, cost in costs_ms[cached].items())
        console.print(f"{'with' if cached else 'without'} the cache, ms a turn by length: {shown}")
    recall_ms, remember_ms = history_ms(tokenizer, expected[-1])
    console.print(
        f"token-exact history: {recall_ms:.2f} ms to recall, {remember_ms:.2f} to remember"
    )
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **vars(arguments),
        "file": arguments.file.name,
        "tokens_reached": len(expected[-1]),
        "recall_ms": recall_ms,
        "remember_ms": remember_ms,
        "gateway_cpu_ms": {str(cached): costs for cached, costs in costs_ms.items()},
    }
    with (ROOT / "benchmarks/history/encoding.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(uvloop.run(main()))
