"""Native attention beside what the machine can do: over a prompt, and of one token far in.

Prompts are measured in operations (4 times head elements for each pair of query head and position
seen) against the bfloat16 peak; one token in bytes of K and V against reading memory, with as many
layers as no cache holds. Memory and peaks are measured beside each repeat, and the best repeat
counts with what was measured beside it. Checked: one thread gives the same bits. Targets: 45% of
the peak at 8K, 75% of memory's rate at 16K.

    python benchmarks/attention.py [--threads 1] [--kv int8] [--heads 14,2,64] [--decode]

Appends a line to benchmarks/history/attention.jsonl.
"""

import argparse
import itertools
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tokenspeed import __version__
from tokenspeed.cache import KVPool
from tokenspeed.core.config import KVSpec
from tokenspeed.kernels.cpu import CpuRuntime, start_runtime
from tokenspeed.kernels.cpu.attention import append, paged_mha
from tokenspeed.kernels.rows import PagedRows

HISTORY = Path(__file__).parent / "history" / "attention.jsonl"
PAGE = 32
REPEATS = 7
KV_SIZE_BYTES = 256 << 20
# Query heads, KV heads and elements of a head, as smollm2-135m and qwen2.5-coder 0.5b, 1.5b have.
SHAPES = ((9, 3, 64), (14, 2, 64), (12, 2, 128))
# Positions before the row's tokens, and tokens.
ROWS = ((0, 512), (3584, 512), (7680, 512), (4095, 1), (16383, 1))


@dataclass(frozen=True)
class Layers:
    """K and V of some layers, and one row over them."""

    kv: list[tuple[torch.Tensor, torch.Tensor]]
    q: torch.Tensor
    rows: PagedRows

    def run(self, runtime: CpuRuntime) -> torch.Tensor:
        for k, v in self.kv:
            out = paged_mha(self.q, k, v, self.rows, 0.1, runtime=runtime)
        return out


def make(
    shape: tuple[int, int, int], context: int, tokens: int, kv: str, runtime: CpuRuntime
) -> Layers:
    heads, kv_heads, head_dim = shape
    pages = -(-(context + tokens) // PAGE)
    spec = KVSpec(layers=1, kv_heads=kv_heads, head_dim=head_dim, dtype=kv)
    layer_size_bytes = pages * PAGE * spec.token_size_bytes
    count = -(-KV_SIZE_BYTES // layer_size_bytes) if tokens == 1 else 1

    pools = KVPool(
        replace(spec, layers=count), pages=pages, page_size=PAGE, device=torch.device("cpu")
    )
    slots = torch.arange(pages * PAGE)
    for layer in range(count):
        k, v = (torch.randn(len(slots), kv_heads, head_dim).bfloat16() for _ in range(2))
        append(k, v, *pools.layer(layer), slots, runtime=runtime)
    return Layers(
        kv=[pools.layer(layer) for layer in range(count)],
        q=torch.randn(tokens, heads, head_dim).bfloat16(),
        rows=PagedRows(
            query_starts=np.array([0, tokens], dtype=np.int32),
            context_lens=np.array([context], dtype=np.int32),
            row_slots=np.array([0], dtype=np.int32),
            page_table_XP=torch.randperm(pages, dtype=torch.int32)[None],
            kv_slots_T=torch.zeros(tokens, dtype=torch.int64),
            page_size=PAGE,
        ),
    )


def limit(runtime: CpuRuntime, tokens: int) -> float:
    """What the machine gives right now: bytes a second read, or bfloat16 operations a second."""
    if tokens == 1:
        return runtime.measure_read_bytes_per_s(size_bytes=KV_SIZE_BYTES, repeats=2)
    return runtime.measure_peaks(repeats=3)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kv", action="append", choices=("bfloat16", "int8"))
    parser.add_argument(
        "--heads", help="query heads, KV heads, elements of a head; all if not said"
    )
    parser.add_argument("--decode", action="store_true", help="rows of one token only")
    options = parser.parse_args()
    runtime, one = start_runtime(threads=options.threads), start_runtime(threads=1)
    table = Table("heads", "KV", "context + tokens", "a layer", "rate", "of what the machine gave")
    found = []
    shapes = [tuple(map(int, options.heads.split(",")))] if options.heads else SHAPES
    for shape, (context, tokens), kv in itertools.product(
        shapes, ROWS, options.kv or ("bfloat16", "int8")
    ):
        if options.decode and tokens > 1:
            continue
        heads, kv_heads, head_dim = shape
        layers = make(shape, context, tokens, kv, runtime)
        assert torch.equal(layers.run(runtime), layers.run(one))
        if tokens == 1:
            spec = KVSpec(layers=1, kv_heads=kv_heads, head_dim=head_dim, dtype=kv)
            work, unit = (context + 1) * spec.token_size_bytes, "GB/s"
        else:
            seen = sum(context + token + 1 for token in range(tokens))
            work, unit = 4 * heads * head_dim * seen, "GFLOP/s"
        times_s, limits = [], []
        for _ in range(REPEATS):
            start_s = time.perf_counter()
            layers.run(runtime)
            times_s.append((time.perf_counter() - start_s) / len(layers.kv))
            limits.append(limit(runtime, tokens))
        best = times_s.index(min(times_s))
        rate = work / times_s[best]
        table.add_row(
            f"{heads}/{kv_heads} of {head_dim}",
            kv,
            f"{context} + {tokens}",
            f"{times_s[best] * 1e6:.0f} us",
            f"{rate / 1e9:.1f} {unit}",
            f"{rate / limits[best]:.0%} of {limits[best] / 1e9:.1f}",
        )
        found.append(
            {
                "shape": shape,
                "kv": kv,
                "context": context,
                "tokens": tokens,
                "layer_s": times_s,
                "limit": limits,
                "fraction_of_limit": rate / limits[best],
            }
        )
    Console(width=100).print(table)
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "threads": options.threads,
        "isa": runtime.isa,
        "runs": found,
    }
    with HISTORY.open("a") as history:
        print(json.dumps(line), file=history)


if __name__ == "__main__":
    main()
