"""Latent attention (MLA) in two forms: absorbed, and over keys and values made from the latents.

Sizes are DeepSeek-V2-Lite's: latents of 512 + 64, 16 heads of 128 + 64 and values of 128. The
second form computes K and V of all positions by the up-projections, writes them to pages, and
attends; that is what prefill does elsewhere. Beside them what one of two ranks that share the
context takes for its part, absorbed, of half of the positions. CPU time of one thread, in bfloat16.

    python benchmarks/latent_attention.py
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tokenspeed import _cpu
from tokenspeed.kernels import PackedWeight
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.kernels.cpu.attention import append
from tokenspeed.kernels.cpu.gemm import linear
from tokenspeed.kernels.cpu.latent import paged_mla, partial_mla
from tokenspeed.kernels.rows import ContextShare, PagedRows

HEADS, NOPE, ROPE, VALUE, RANK = 16, 128, 64, 128, 512
PAGE = 32
ROWS = ((4095, 1), (3584, 64), (3584, 192), (3584, 512), (0, 512))
SCALE = (NOPE + ROPE) ** -0.5


def best_s(run: Callable[[], object]) -> float:
    found = []
    for _ in range(5):
        start_s = time.thread_time()
        run()
        found.append(time.thread_time() - start_s)
    return min(found)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def main() -> None:
    runtime = start_runtime(threads=1)
    peak = runtime.measure_peaks(repeats=10)[1]
    up = PackedWeight(
        (HEADS * (NOPE + VALUE), RANK),
        parts=(HEADS * (NOPE + VALUE),),
        dtype=torch.bfloat16,
        runtime=runtime,
    )
    up.pack_dense(0, noise(HEADS * (NOPE + VALUE), RANK))
    table = Table(
        "context + tokens",
        "absorbed",
        "of the bf16 peak",
        "a part of two",
        "keys and values made of it",
    )
    for context, tokens in ROWS:
        length = context + tokens
        pages = -(-length // PAGE)
        rows = PagedRows(
            query_starts=np.array([0, tokens], dtype=np.int32),
            context_lens=np.array([context], dtype=np.int32),
            row_slots=np.array([0], dtype=np.int32),
            page_table_XP=torch.randperm(pages, dtype=torch.int32)[None],
            kv_slots_T=torch.zeros(tokens, dtype=torch.int64),
            page_size=PAGE,
        )
        latents, q = noise(pages, PAGE, RANK + ROPE), noise(tokens, HEADS, RANK + ROPE)
        absorbed_s = best_s(
            partial(paged_mla, q, latents, rows, SCALE, value_dim=RANK, runtime=runtime)
        )
        half = replace(rows, share=ContextShare(index=0, ranks=2))
        half_s = best_s(
            partial(partial_mla, q, latents, half, SCALE, value_dim=RANK, runtime=runtime)
        )
        seen = sum(context + token + 1 for token in range(tokens))
        rate = 2 * (RANK + ROPE + RANK) * HEADS * seen / absorbed_s

        compressed = noise(length, RANK)
        k_pool, v_pool = noise(pages, PAGE, HEADS, NOPE + ROPE), noise(pages, PAGE, HEADS, VALUE)
        k, v = noise(length, HEADS, NOPE + ROPE), noise(length, HEADS, VALUE)
        wide_q, y = noise(tokens, HEADS, NOPE + ROPE), noise(tokens, HEADS, VALUE)
        table_of_rows = (rows.query_starts, rows.context_lens, rows.row_slots, rows.page_table_XP)
        slots = torch.arange(length)
        parts_s = (
            best_s(partial(linear, compressed, up, None, runtime=runtime)),
            best_s(partial(append, k, v, k_pool, v_pool, slots, runtime=runtime)),
            best_s(
                partial(
                    _cpu.attend,
                    runtime,
                    wide_q,
                    k_pool,
                    v_pool,
                    *table_of_rows,
                    SCALE,
                    0,
                    0.0,
                    None,
                    y,
                )
            ),
        )
        words = " + ".join(f"{part_s * 1e3:.1f}" for part_s in parts_s)
        table.add_row(
            f"{context} + {tokens}",
            f"{absorbed_s * 1e3:.2f} ms",
            f"{rate / peak:.0%}",
            f"{half_s * 1e3:.2f} ms",
            f"{words} = {sum(parts_s) * 1e3:.1f} ms",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
