"""Two libraries that constrain what a model writes, on the same constraints: xgrammar, llguidance.

    pip install xgrammar llguidance
    python benchmarks/constraints.py [--model MODEL]... [--steps N]

For every case (benchmarks/support/constraint_cases.py): is the constraint taken or refused, are the
texts that it allows allowed token by token (as the tokenizer cuts them, and with characters beyond
ASCII cut into bytes), and are the others stopped. A constraint that is taken and lets wrong texts
pass is the one outcome that an engine must not have. Then the time of a compilation and of
the masks along those texts, and what hostile constraints do to a process of two gigabytes and ten
seconds: compile, and up to N masks with a random allowed token after each.

Each library has a process of its own; each hostile constraint one that is forked from it. Times
are CPU times, medians and maxima over all cases, each of which has the least of three runs.
Appends to benchmarks/history/constraints.jsonl.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import resource
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from support.constraint_cases import CASES, HOSTILE, Case

from tokenspeed.loader import Tokenizer, resolve

ROOT = Path(__file__).parents[1]
LIBRARIES = ("xgrammar", "llguidance")
HOSTILE_TIME_MAX_S = 10.0
HOSTILE_MEMORY_MAX_BYTES = 2 << 30
MASK_RUNS = 3


class Refused(Exception):
    """The library does not take the constraint, and says so."""


class Matcher(Protocol):
    """A place in a text under a constraint."""

    def mask(self) -> npt.NDArray[np.int32]:
        """The allowed tokens, a bit each."""

    def take(self, token: int) -> None:
        """Go on by an allowed token."""


class Library(Protocol):
    """One of the two."""

    def compile(self, case: Case) -> Callable[[], Matcher]:
        """What makes matchers; raises Refused."""


class XGrammar:
    """With its defaults: strict mode, any white space."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, vocabulary: int) -> None:
        import xgrammar  # noqa: PLC0415

        self._library = xgrammar
        # Byte-level texts as in the vocabulary, as the library's own reader of tokenizers does.
        reader = tokenizer._tokenizer
        texts = [reader.id_to_token(index) or "" for index in range(vocabulary)]
        info = xgrammar.TokenizerInfo(
            texts,
            xgrammar.VocabType.BYTE_LEVEL,
            vocab_size=vocabulary,
            stop_token_ids=list(tokenizer.eos_token_ids),
            add_prefix_space=False,
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._words = (vocabulary + 31) // 32

    def compile(self, case: Case) -> Callable[[], Matcher]:
        compiler = self._compiler
        try:
            if case.kind == "json":
                compiled = compiler.compile_json_schema(case.text, strict_mode=False)
            elif case.kind == "regex":
                compiled = compiler.compile_regex(case.text)
            else:
                compiled = compiler.compile_grammar(case.text)
        except Exception as error:
            raise Refused(str(error)) from None
        return lambda: _XGrammarMatcher(self._library, compiled, self._words)


class _XGrammarMatcher:
    def __init__(self, library: Any, compiled: Any, words: int) -> None:
        import torch  # noqa: PLC0415

        self._matcher = library.GrammarMatcher(compiled)
        self._bits = torch.full((1, words), -1, dtype=torch.int32)

    def mask(self) -> npt.NDArray[np.int32]:
        self._bits.fill_(-1)
        self._matcher.fill_next_token_bitmask(self._bits)
        return self._bits[0].numpy()

    def take(self, token: int) -> None:
        if not self._matcher.accept_token(token):
            raise Refused("an allowed token is not accepted")


class LLGuidance:
    """With its defaults."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, vocabulary: int) -> None:
        import llguidance  # noqa: PLC0415

        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(
            str(folder / "tokenizer.json"),
            n_vocab=vocabulary,
            eos_token=list(tokenizer.eos_token_ids),
        )
        self._words = (vocabulary + 31) // 32

    def compile(self, case: Case) -> Callable[[], Matcher]:
        library = self._library
        try:
            kind = {"json": "json_schema", "ebnf": "ebnf"}.get(case.kind, case.kind)
            grammar = library.grammar_from(kind, case.text)
        except (ValueError, RecursionError) as error:
            raise Refused(str(error)) from None
        first = library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if first.is_error():
            raise Refused(first.get_error())
        return lambda: _LLGuidanceMatcher(first.deep_copy(), self._words)


class _LLGuidanceMatcher:
    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros(words, dtype=np.int32)

    def mask(self) -> npt.NDArray[np.int32]:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise Refused(self._matcher.get_error())
        return self._bits

    def take(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise Refused(self._matcher.get_error())


def main() -> None:
    """Compare, print, append."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", dest="models")
    parser.add_argument("--steps", type=int, default=100, help="masks of a hostile constraint")
    parser.add_argument("--library", choices=LIBRARIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    models = arguments.models or ["qwen2.5-coder-0.5b", "smollm2-135m"]
    if arguments.library:
        print(json.dumps(measured(arguments.library, models[0], arguments.steps)))
        return
    for model in models:
        found = {}
        for library in LIBRARIES:
            command = [sys.executable, __file__, "--library", library, "--model", model]
            command += ["--steps", str(arguments.steps)]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            found[library] = json.loads(run.stdout.splitlines()[-1])
        show(model, found)
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "model": model,
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "results": found,
        }
        with (ROOT / "benchmarks/history/constraints.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def measured(name: str, model: str, steps: int) -> dict[str, Any]:
    """Everything about one library, in this process."""
    begin_s, size_bytes = time.process_time(), _memory_size_bytes()
    files = resolve(model)
    tokenizer = Tokenizer(files.tokenizer_dir)
    vocabulary = json.loads((files.tokenizer_dir / "config.json").read_text())["vocab_size"]
    library: Library = {"xgrammar": XGrammar, "llguidance": LLGuidance}[name](
        tokenizer, files.tokenizer_dir, vocabulary
    )
    start = {
        "start_s": time.process_time() - begin_s,
        "start_size_bytes": _memory_size_bytes() - size_bytes,
    }
    alphabet = _bytes_tokens(tokenizer, vocabulary)
    cases = {case.name: _checked(library, case, tokenizer, alphabet) for case in CASES}
    size_bytes = _memory_size_bytes()
    hostile = {
        case.name: _survived(library, case, steps, tokenizer.eos_token_ids) for case in HOSTILE
    }
    return {**start, "size_bytes": size_bytes, "cases": cases, "hostile": hostile}


def _checked(
    library: Library, case: Case, tokenizer: Tokenizer, alphabet: Sequence[int]
) -> dict[str, Any]:
    compile_s = []
    try:
        for _ in range(MASK_RUNS):
            begin_s = time.process_time()
            start = library.compile(case)
            start().mask()
            compile_s.append(time.process_time() - begin_s)
    except Refused as refusal:
        return {"refused": str(refusal).strip().splitlines()[0][:160]}
    masks_s: list[float] = []

    def allowed(text: str) -> bool:
        cuts = [tokenizer.encode(text)]
        if not text.isascii():
            cuts.append(_cut(text, tokenizer, alphabet))
        return all(_allows(start, ids, tokenizer.eos_token_ids, masks_s) for ids in cuts)

    return {
        "stopped": [text for text in case.takes if not allowed(text)],
        "passed": [text for text in case.leaves if allowed(text)],
        "compile_s": min(compile_s),
        "masks_s": masks_s,
    }


def _cut(text: str, tokenizer: Tokenizer, alphabet: Sequence[int]) -> list[int]:
    """Tokens of a text whose characters beyond ASCII are a token a byte."""
    ids: list[int] = []
    for part in re.findall("[\x00-\x7f]+|[^\x00-\x7f]+", text):
        ids += tokenizer.encode(part) if part.isascii() else [alphabet[b] for b in part.encode()]
    return ids


def _allows(
    start: Callable[[], Matcher], ids: Sequence[int], ends: Sequence[int], masks_s: list[float]
) -> bool:
    runs = []
    for _ in range(MASK_RUNS):
        times_s = []
        matcher = start()
        allowed = True
        for token in [*ids, ends[0]]:
            begin_s = time.process_time()
            bits = matcher.mask()
            times_s.append(time.process_time() - begin_s)
            if not bits[token // 32] >> (token % 32) & 1:
                allowed = False
                break
            if token != ends[0]:
                matcher.take(token)
        runs.append(times_s)
    masks_s += [min(times) for times in zip(*runs, strict=True)]
    return allowed


def _bytes_tokens(tokenizer: Tokenizer, vocabulary: int) -> list[int]:
    """The token of each byte."""
    of = {tokenizer.bytes_of(token): token for token in reversed(range(vocabulary))}
    # Bytes that no UTF-8 has may have no token.
    return [of.get(bytes([byte]), 0) for byte in range(256)]


def _survived(library: Library, case: Case, steps: int, ends: Sequence[int]) -> dict[str, Any]:
    """What a hostile constraint did to a process of its own."""
    readable, writable = os.pipe()
    begin_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = _memory_size_bytes(of_address_space=True) + HOSTILE_MEMORY_MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        outcome: dict[str, Any] = {}
        try:
            outcome = _walked(library, case, steps, ends)
        except MemoryError:
            outcome = {"end": "out of memory"}
        except BaseException as error:
            outcome = {"end": f"raised {type(error).__name__}"}
        finally:
            os.write(writable, json.dumps(outcome).encode())
            os._exit(0)
    os.close(writable)
    in_time = select.select([readable], [], [], HOSTILE_TIME_MAX_S)[0]
    if not in_time:
        os.kill(pid, signal.SIGKILL)
    data = os.read(readable, 1 << 16)
    os.close(readable)
    status, usage = os.wait4(pid, 0)[1:]
    if not in_time:
        outcome = {"end": "out of time"}
    elif os.WIFSIGNALED(status):
        outcome = {"end": f"killed by {signal.Signals(os.WTERMSIG(status)).name}"}
    else:
        outcome = json.loads(data)
    return {
        **outcome,
        "wall_s": time.monotonic() - begin_s,
        "memory_size_bytes": usage.ru_maxrss * 1024,
    }


def _walked(library: Library, case: Case, steps: int, ends: Sequence[int]) -> dict[str, Any]:
    begin_s = time.process_time()
    try:
        matcher = library.compile(case)()
    except Refused as refusal:
        return {
            "end": "refused",
            "compile_s": time.process_time() - begin_s,
            "why": str(refusal).strip().splitlines()[0][:160],
        }
    compile_s = time.process_time() - begin_s
    choose = random.Random(0)
    masks_s = []
    end = "walked"
    try:
        for _ in range(steps):
            begin_s = time.process_time()
            bits = matcher.mask()
            masks_s.append(time.process_time() - begin_s)
            flags = np.unpackbits(bits.view(np.uint8), bitorder="little")
            if not flags.any():
                end = "stuck"
                break
            flags[list(ends)] = 0
            going_on = np.flatnonzero(flags)
            if not len(going_on):
                break
            matcher.take(int(going_on[choose.randrange(len(going_on))]))
    except Refused:
        end = "gave up on the way" if len(masks_s) < 2 else "walked"
    return {"end": end, "compile_s": compile_s, "mask_max_s": max(masks_s, default=None)}


def _memory_size_bytes(*, of_address_space: bool = False) -> int:
    pages = Path("/proc/self/statm").read_text().split()[0 if of_address_space else 1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def show(model: str, found: dict[str, dict[str, Any]]) -> None:
    """Tables for people."""
    console = Console(width=118)
    table = Table(title=f"constraints, {model}", title_justify="left")
    table.add_column("")
    for name in found:
        table.add_column(f"{name} {importlib.metadata.version(name)}", justify="right")

    def row(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(title, *(cell(result) for result in found.values()))

    def cases(result: dict[str, Any], key: str) -> list[str]:
        return [name for name, case in result["cases"].items() if case.get(key)]

    def times(result: dict[str, Any], key: str) -> list[float]:
        values = [case[key] for case in result["cases"].values() if key in case]
        return [t for value in values for t in (value if isinstance(value, list) else [value])]

    def spread(values: list[float], unit: float) -> str:
        p99 = sorted(values)[int(len(values) * 0.99)]
        return " / ".join(f"{v / unit:.2f}" for v in (statistics.median(values), p99, max(values)))

    row(
        "cases enforced exactly",
        lambda r: (
            f"{sum(c.get('passed') == c.get('stopped') == [] for c in r['cases'].values())} "
            f"of {len(CASES)}"
        ),
    )
    row("taken, and wrong texts pass", lambda r: ", ".join(cases(r, "passed")) or "none")
    row("taken, and right texts are stopped", lambda r: ", ".join(cases(r, "stopped")) or "none")
    row("refused", lambda r: ", ".join(cases(r, "refused")) or "none")
    row("compile ms, median / p99 / max", lambda r: spread(times(r, "compile_s"), 1e-3))
    row("mask ms, median / p99 / max", lambda r: spread(times(r, "masks_s"), 1e-3))
    row("start s", lambda r: f"{r['start_s']:.2f}")
    row(
        "start MB, with all cases MB",
        lambda r: f"{r['start_size_bytes'] / 1e6:.0f}, {r['size_bytes'] / 1e6:.0f}",
    )
    console.print(table)
    table = Table(title="hostile: end, compile s, longest mask ms, peak MB", title_justify="left")
    table.add_column("")
    for name in found:
        table.add_column(name)
    for case in HOSTILE:
        table.add_row(
            case.name, *(_line(result["hostile"][case.name]) for result in found.values())
        )
    console.print(table)


def _line(outcome: dict[str, Any]) -> str:
    parts = [outcome["end"]]
    parts += [f"{outcome['compile_s']:.2f}"] if "compile_s" in outcome else []
    parts += [f"{outcome['mask_max_s'] * 1e3:.1f}"] if outcome.get("mask_max_s") else []
    return ", ".join([*parts, f"{outcome['memory_size_bytes'] / 1e6:.0f}"])


if __name__ == "__main__":
    main()
