"""What stands between logits and tokens costs: reference kernels beside native ones.

    python benchmarks/sampling.py [--vocabulary 151936]

CPU time of one thread, the least of many runs, for each op on one row of logits, and for a step's
rows through the samplers: what a request asks for beside the likeliest token, all of it in one
call for the native one. Each op's result is held against the reference's first. Appends a line to
benchmarks/history/sampling.jsonl.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tokenspeed import __version__
from tokenspeed.core.sampling import SamplingParams
from tokenspeed.execution import CpuSampler, Sampler
from tokenspeed.kernels import KernelSelector
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.kernels.ops import sampling as ops

HISTORY = Path(__file__).parent / "history" / "sampling.jsonl"
CPU = torch.device("cpu")
OPS = (ops.add_bias, ops.apply_bitmask, ops.argmax, ops.draw, ops.logprobs, ops.penalise)
REPEATS = 40
SEEN = 500
# A prompt of so many tokens and their number in the output so far.
PROMPT, OUTPUT = 2000, 200


def least_us(call: Callable[[], object]) -> float:
    """CPU time of the calling thread."""
    best_s = float("inf")
    for _ in range(REPEATS):
        begin_s = time.thread_time()
        call()
        best_s = min(best_s, time.thread_time() - begin_s)
    return best_s * 1e6


def selector(*, reference: bool) -> KernelSelector:
    return KernelSelector(
        device=CPU,
        dtype=torch.float32,
        overrides={op.name: "reference" for op in OPS} if reference else None,
        runtime=start_runtime(threads=1),
    )


def op_calls(
    kernels: KernelSelector, logits_1V: torch.Tensor
) -> Mapping[str, Callable[[], object]]:
    """Each op on one row, by its name; what they change is a copy of their own."""
    vocabulary = logits_1V.shape[1]
    generator = torch.Generator().manual_seed(1)
    words = -(-vocabulary // 32)
    bitmask = torch.randint(-(2**31), 2**31, (1, words), generator=generator).to(torch.int32)
    seen = torch.randperm(vocabulary, generator=generator)[:SEEN]
    counts = torch.arange(SEEN, dtype=torch.int32) % 5
    values = torch.randn(SEEN, generator=generator)
    own = logits_1V.clone()
    add_bias, apply_bitmask, argmax, draw, logprobs, penalise = (
        kernels.select(op, format_name="float32") for op in OPS
    )

    def drawn(top_k: int, top_p: float) -> object:
        return draw(
            logits_1V,
            torch.tensor([0.3], dtype=torch.float64),
            temperatures_S=torch.tensor([0.7], dtype=torch.float64),
            top_ks_S=torch.tensor([top_k]),
            top_ps_S=torch.tensor([top_p], dtype=torch.float64),
            min_ps_S=torch.tensor([0.0], dtype=torch.float64),
        )

    return {
        "bitmask": lambda: apply_bitmask(own, bitmask),
        f"penalties of {SEEN} tokens": lambda: penalise(
            own[0], seen, counts, repetition=1.1, presence=0.1, frequency=0.1
        ),
        f"bias of {SEEN} tokens": lambda: add_bias(own[0], seen, values),
        "log-probabilities, 20 likeliest": lambda: logprobs(logits_1V, torch.tensor([5]), 20),
        "likeliest token": lambda: argmax(logits_1V),
        "draw": lambda: drawn(vocabulary, 1.0),
        "draw, top-k 20, top-p 0.8": lambda: drawn(20, 0.8),
        "draw, top-p 0.95": lambda: drawn(vocabulary, 0.95),
    }


REQUESTS: Mapping[str, tuple[SamplingParams, bool]] = {
    "a row: bitmask": (SamplingParams(temperature=0.0), True),
    "a row: bitmask, top-k 20, top-p 0.8": (SamplingParams(top_k=20, top_p=0.8), True),
    "a row: all penalties": (
        SamplingParams(
            temperature=0.0, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1
        ),
        False,
    ),
    "a row: log-probabilities, 5 likeliest": (SamplingParams(temperature=0.0, logprobs=5), False),
    "a row: bias of 100 tokens": (
        SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(range(100), 1.0)),
        False,
    ),
}


def rows_us(logits_1V: torch.Tensor, make: type[Sampler] | type[CpuSampler]) -> dict[str, float]:
    """Of each kind of request, one row through a sampler."""
    vocabulary = logits_1V.shape[1]
    generator = np.random.default_rng(2)
    tokens = generator.integers(0, vocabulary, PROMPT + OUTPUT).astype(np.int32)
    words = generator.integers(-(2**31), 2**31, -(-vocabulary // 32)).astype(np.int32)
    slots, positions = np.zeros(1, dtype=np.int32), np.array([OUTPUT], dtype=np.int32)
    took = {}
    for name, (params, confined) in REQUESTS.items():
        sampler = make(
            slots_max=1, vocabulary=vocabulary, kernels=selector(reference=make is Sampler)
        )
        sampler.bind(
            0,
            params,
            seed=1,
            prompt_count=PROMPT,
            tokens=tokens,
            stop_token_ids=np.zeros(0, dtype=np.int32),
        )
        if confined:
            sampler.allow(0, torch.from_numpy(words))
        own = logits_1V.clone()

        def sample(sampler: Sampler | CpuSampler = sampler, own: torch.Tensor = own) -> object:
            return sampler.sample(own, slots, positions)

        took[name] = least_us(sample)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logits_1V = torch.randn(1, options.vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    reference = op_calls(selector(reference=True), logits_1V)
    native = op_calls(selector(reference=False), logits_1V)
    for name in ("log-probabilities, 20 likeliest", "likeliest token", "draw, top-k 20, top-p 0.8"):
        ours, theirs = native[name](), reference[name]()
        for mine, other in zip(
            *((each if isinstance(each, tuple) else (each,)) for each in (ours, theirs)),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, rtol=0.0, atol=1e-5)
    figures = {
        name: {"reference": least_us(call), "native": least_us(native[name])}
        for name, call in reference.items()
    }
    before, after = rows_us(logits_1V, Sampler), rows_us(logits_1V, CpuSampler)
    figures |= {name: {"reference": before[name], "native": after[name]} for name in REQUESTS}
    table = Table(title=f"{options.vocabulary:,} tokens, microseconds of CPU, one thread")
    for column in ("", "reference", "native"):
        table.add_column(column)
    for name, both in figures.items():
        table.add_row(name, *(f"{value:.0f}" for value in both.values()))
    Console().print(table)
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "vocabulary": options.vocabulary,
        "us": figures,
    }
    with HISTORY.open("a") as history:
        print(json.dumps(line), file=history)


if __name__ == "__main__":
    main()
