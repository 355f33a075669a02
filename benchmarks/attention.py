"""Native attention beside what the machine can do: over a prompt, and of one token far in.

Prompts are measured in operations (4 times head elements for each pair of query head and position
seen) against the bfloat16 peak; one token in bytes of K and V against reading memory, with as many
layers as no cache holds. Checked: one thread gives the same bits. Targets: 45% of the peak at 8K,
75% of memory's rate at 16K.

    python benchmarks/attention.py [--threads 1]

Appends a line to benchmarks/history/attention.jsonl.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tokenspeed import __version__
from tokenspeed.kernels.cpu import CpuRuntime, Roofline, prefer_huge_pages, start_runtime
from tokenspeed.kernels.cpu.attention import paged_mha
from tokenspeed.kernels.rows import PagedRows

HISTORY = Path(__file__).parent / "history" / "attention.jsonl"
PAGE = 32
REPEATS = 5
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


def make(shape: tuple[int, int, int], context: int, tokens: int) -> Layers:
    heads, kv_heads, head_dim = shape
    pages = -(-(context + tokens) // PAGE)
    layer_size_bytes = 2 * pages * PAGE * kv_heads * head_dim * 2
    count = -(-KV_SIZE_BYTES // layer_size_bytes) if tokens == 1 else 1

    def pool() -> torch.Tensor:
        made = torch.empty((pages, PAGE, kv_heads, head_dim), dtype=torch.bfloat16)
        prefer_huge_pages(made)
        return made.normal_()

    return Layers(
        kv=[(pool(), pool()) for _ in range(count)],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    runtime, one = start_runtime(threads=options.threads), start_runtime(threads=1)
    table = Table("heads", "context + tokens", "a layer", "rate", "of what the machine gave")
    found = []
    for shape in SHAPES:
        for context, tokens in ROWS:
            layers = make(shape, context, tokens)
            assert torch.equal(layers.run(runtime), layers.run(one))
            times_s = []
            for _ in range(REPEATS):
                start_s = time.perf_counter()
                layers.run(runtime)
                times_s.append((time.perf_counter() - start_s) / len(layers.kv))
            most = Roofline.measure(runtime, repeats=3)
            heads, kv_heads, head_dim = shape
            if tokens == 1:
                work = 2 * 2 * (context + 1) * kv_heads * head_dim
                limit, unit = most.read_bytes_per_s, "GB/s"
            else:
                seen = sum(context + token + 1 for token in range(tokens))
                work = 4 * heads * head_dim * seen
                limit, unit = most.bf16_ops_per_s, "GFLOP/s"
            best_s = min(times_s)
            table.add_row(
                f"{heads}/{kv_heads} of {head_dim}",
                f"{context} + {tokens}",
                f"{best_s * 1e6:.0f} us",
                f"{work / best_s / 1e9:.1f} {unit}",
                f"{work / best_s / limit:.0%}",
            )
            found.append(
                {
                    "shape": shape,
                    "context": context,
                    "tokens": tokens,
                    "layer_s": times_s,
                    "fraction_of_limit": work / best_s / limit,
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
