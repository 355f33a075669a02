"""One stream, engine against engine: prefill and decode at several depths, A B A B.

Each engine holds the model in a process of its own, which idles while another one works. In each
of the pairs every engine gets the same new prompt of random tokens, in turn; the first round warms
up and is not counted. Ours runs twice, with KV in bfloat16, the default, and in bytes, as OpenVINO
keeps it by default. Printed and recorded: tokens a second of prefill and decode, and the median of
our rates over each peer's within a round. Checked: every engine gave as many tokens as were
asked for. Printed as well: for how many prompts llama.cpp, which reads the same file, chose our
first token.

    python benchmarks/peers.py [--model smollm2-135m] [--pairs 5] [--engines llama.cpp vllm]

Appends one line a model to benchmarks/history/peers.jsonl.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenspeed import __version__, loader
from tokenspeed.bench.peers import hf_folder, openvino_folder, python
from tokenspeed.core.environment import peers_dir

ENGINES = Path(__file__).parent / "engines"
HISTORY = Path(__file__).parent / "history" / "peers.jsonl"

# Prompt and new tokens of each piece of work, by model.
PREFILL = {"smollm2-135m": (512, 2048), "qwen2.5-coder-0.5b": (512, 2048, 8192)}
DECODE = {
    "smollm2-135m": (16, 4096),
    "qwen2.5-coder-0.5b": (16, 4096, 16384),
    "qwen2.5-coder-1.5b": (16, 4096),
}
NEW_TOKENS = 64
OURS = ("tokenspeed", "tokenspeed-int8")
PEERS = {
    "smollm2-135m": ("llama.cpp", "vllm", "openvino-int4"),
    "qwen2.5-coder-0.5b": ("llama.cpp", "vllm", "openvino-int4", "openvino-int8"),
    "qwen2.5-coder-1.5b": ("llama.cpp",),
}


@dataclass(frozen=True)
class Work:
    """A prompt, and how many tokens are wanted."""

    prompt: tuple[int, ...]
    new_tokens: int

    @property
    def name(self) -> str:
        depth = len(self.prompt)
        return f"prefill {depth}" if self.new_tokens == 1 else f"decode at {depth}"


class Worker:
    """An engine in a process of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        log = (peers_dir() / f"{Path(command[1]).stem}.log").open("w")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
            cwd=ENGINES,
        )
        assert self._hear() == {"ready": True}

    def run(self, work: Work) -> dict[str, Any]:
        assert self._process.stdin is not None
        request = {"prompt": work.prompt, "new_tokens": work.new_tokens}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended; see the logs in {peers_dir()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def start(engine: str, name: str, threads: int, context: int) -> Worker:
    files = loader.resolve(name)
    folder = engine.partition("-")[0]
    script = str(ENGINES / f"{folder.replace('.cpp', '')}_worker.py")
    interpreter = sys.executable if engine in OURS else str(python(folder))
    command = [interpreter, script]
    environment = {}
    if engine in OURS:
        command += [name, str(threads), str(context), engine.partition("-")[2] or "auto"]
    elif engine == "llama.cpp":
        # Repacked, the 1.5B model's prefill is slower.
        extra = ["--no-repack"] if name.endswith("1.5b") else []
        command += [str(files.path), str(threads), str(context), *extra]
    elif engine == "vllm":
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "3",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        }
        command += [str(hf_folder(files, name)), str(context)]
    else:
        command += [str(openvino_folder(files, name, engine.partition("-")[2])), str(threads)]
    return Worker(command, environment)


def measure(
    name: str, engines: list[str], pairs: int, threads: int, depth_max: int | None
) -> dict[str, Any]:
    draw = random.Random(1)
    works = [(depth, 1) for depth in PREFILL.get(name, ())]
    works += [(depth, NEW_TOKENS) for depth in DECODE[name]]
    works = [work for work in works if depth_max is None or work[0] <= depth_max]
    context = max(depth for depth, _ in works) + 2 * NEW_TOKENS
    workers = {engine: start(engine, name, threads, context) for engine in engines}
    rates: dict[str, dict[str, list[float]]] = {}
    agreed: list[bool] = []
    for depth, new_tokens in works:
        found: dict[str, list[float]] = {engine: [] for engine in engines}
        for round_number in range(pairs + 1):
            # A new prompt for each round: some engines keep what they have seen.
            work = Work(tuple(draw.randrange(1000, 40000) for _ in range(depth)), new_tokens)
            rates[work.name] = found
            said: dict[str, list[int]] = {}
            for engine, worker in workers.items():
                answer = worker.run(work)
                assert len(answer["tokens"]) == new_tokens, (engine, work.name)
                said[engine] = answer["tokens"]
                rate = (
                    depth / answer["first_s"]
                    if new_tokens == 1
                    else (new_tokens - 1) / answer["rest_s"]
                )
                if round_number > 0:
                    found[engine].append(rate)
            if "llama.cpp" in said:
                agreed.append(said["tokenspeed"][0] == said["llama.cpp"][0])
        print(
            f"  {name} {work.name}: "
            + ", ".join(f"{engine} {statistics.median(r):.1f}" for engine, r in found.items()),
            flush=True,
        )
    for worker in workers.values():
        worker.close()
    if agreed:
        print(f"  llama.cpp chose our first token for {sum(agreed)} of {len(agreed)} prompts")
    return {"tokens_per_s": rates, "first_tokens_agreed": f"{sum(agreed)} of {len(agreed)}"}


def ratios(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def show(name: str, rates: dict[str, dict[str, list[float]]]) -> None:
    table = Table(title=f"{name}: tokens a second, min / median / max; our rates over theirs")
    for column in ("work", *next(iter(rates.values()))):
        table.add_column(column)
    for work, found in rates.items():
        cells = []
        for engine, of in found.items():
            cell = f"{min(of):.1f} / {statistics.median(of):.1f} / {max(of):.1f}"
            if engine not in OURS:
                cell += "  " + ", ".join(f"x{ratios(found[ours], of):.2f}" for ours in OURS)
            cells.append(cell)
        table.add_row(work, *cells)
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=sorted(PEERS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--depth-max", type=int, help="leave out work on longer prompts")
    parser.add_argument("--engines", nargs="*", help="peers; all that suit the model by default")
    options = parser.parse_args()
    peers_dir().mkdir(parents=True, exist_ok=True)
    for name in options.model or PEERS:
        peers = list(options.engines if options.engines is not None else PEERS[name])
        load = os.getloadavg()[0]
        result = measure(name, [*OURS, *peers], options.pairs, options.threads, options.depth_max)
        show(name, result["tokens_per_s"])
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": __version__,
            "model": name,
            "threads": options.threads,
            "pairs": options.pairs,
            "new_tokens": NEW_TOKENS,
            "load_before": load,
            "machine": platform.processor() or platform.machine(),
            "python": sys.version.split()[0],
            **result,
        }
        with HISTORY.open("a") as history:
            print(json.dumps(line), file=history)


if __name__ == "__main__":
    main()
