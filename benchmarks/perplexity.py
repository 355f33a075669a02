"""How well packed weights and rounded inputs predict a text, beside float32 and llama.cpp.

The text is source code and prose that Python itself ships, the first --tokens tokens of it. As in
llama.cpp's own tool, it is cut into pieces (of 512 tokens) that do not see each other, and the
second half of each is scored. Ours runs as users run it, in bfloat16 with native kernels; the
oracle has the dequantised weights in float32 and reference kernels. Targets: within 0.5% of the
oracle, and no worse than llama.cpp.

A perplexity differs from the oracle's by chance, too: beside each difference stands its standard
error, and how far distributions are from the oracle's on average (Kullback and Leibler 1951), which
tells kernels apart on far fewer tokens.

The same with KV in INT8 stands beside it. --context cuts longer pieces, so that attention reads
more of it.

    python benchmarks/perplexity.py [--model smollm2-135m] [--tokens N] [--context 2048] [--peer]

Appends one line a model to benchmarks/history/perplexity.jsonl.
"""

import argparse
import json
import os
import pydoc_data.topics
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tokenspeed import __version__, loader
from tokenspeed.bench.peers import llama_tool
from tokenspeed.cache import KVPools
from tokenspeed.kernels import PACKED, QUANTISED_ROWS, KernelSelector
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.modeling import ForwardBatch, Model, ModelConfig, build_model

HISTORY = Path(__file__).parent / "history" / "perplexity.jsonl"
PAGE = 32
CPU = torch.device("cpu")


def text() -> str:
    """Prose of the language reference, then modules of the standard library."""
    prose = "\n\n".join(body for _, body in sorted(pydoc_data.topics.topics.items()))
    modules = ("argparse", "ast", "asyncio/base_events", "dataclasses", "inspect", "tarfile")
    library = Path(os.__file__).parent
    code = "\n".join((library / f"{name}.py").read_text() for name in modules)
    # As much of either.
    size = min(len(prose), len(code))
    return prose[:size] + "\n" + code[:size]


def load(
    checkpoint: loader.Checkpoint,
    *,
    exact: bool,
    dtype: torch.dtype,
    threads: int,
    kv: str | None = None,
) -> Model:
    name = str(dtype).removeprefix("torch.")
    kernels = KernelSelector(
        device=CPU,
        dtype=dtype,
        weight_formats=(name,) if exact else (PACKED, name),
        activation_formats=None if exact else (QUANTISED_ROWS,),
        kv_formats=(name,) if exact else (f"interleaved_{kv or name}",),
        overrides={"gemm.linear": "reference", "gemm.logits": "reference"} if exact else None,
        runtime=start_runtime(threads=threads),
    )
    config = ModelConfig.from_hf(checkpoint.hf_config)
    model = build_model(config, dtype=dtype, device=CPU, kernels=kernels)
    model.load_weights(checkpoint.blocks())
    return model


@torch.inference_mode()
def likelihoods(model: Model, tokens: list[int], piece_size: int) -> Iterator[torch.Tensor]:
    """Log-probabilities of what follows the tokens of each piece's second half, [_, V]."""
    pages = piece_size // PAGE
    kv = KVPools(model.kv_specs(), pages=pages, page_size=PAGE, device=CPU)
    table = torch.arange(pages, dtype=torch.int32)[None]
    rows = PagedRows(
        query_starts=np.array([0, piece_size], dtype=np.int32),
        context_lens=np.array([0], dtype=np.int32),
        row_slots=np.array([0], dtype=np.int32),
        page_table_XP=table,
        kv_slots_T=torch.arange(piece_size),
        page_size=PAGE,
    )
    scored = torch.arange(piece_size // 2 - 1, piece_size - 1)
    for start in range(0, len(tokens) - piece_size + 1, piece_size):
        piece = torch.tensor(tokens[start : start + piece_size])
        batch = ForwardBatch(
            token_ids_T=piece,
            positions_T=torch.arange(piece_size),
            groups=(rows,),
            sample_token_indices_S=scored,
        )
        yield model.forward(batch, kv).log_softmax(-1)


def measure(
    models: Sequence[Model], tokens: list[int], piece_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each model, the last being the oracle: every scored token's loss [models, tokens], and
    the mean divergence from the oracle [models]."""
    losses: list[torch.Tensor] = []
    divergences: list[torch.Tensor] = []
    for index, found in enumerate(
        zip(*(likelihoods(model, tokens, piece_size) for model in models), strict=True)
    ):
        first = index * piece_size
        wanted = torch.tensor(tokens[first + piece_size // 2 : first + piece_size])[:, None]
        losses.append(torch.stack([-each.gather(1, wanted)[:, 0] for each in found]))
        exact = found[-1]
        shares = exact.exp()
        apart = [(shares * (exact - each)).sum(-1).mean() for each in found]
        divergences.append(torch.stack(apart))
    return torch.cat(losses, 1).double(), torch.stack(divergences).double().mean(0)


def of_llama(path: Path, words: str, pieces: int, piece_size: int, threads: int) -> float:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(words)
        file.flush()
        done = subprocess.run(
            [
                *(str(llama_tool("llama-perplexity")), "-m", str(path), "-f", file.name),
                *("-c", str(piece_size), "--chunks", str(pieces), "-t", str(threads), "-fa", "on"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    assert found, done.stderr[-2000:]
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--context", type=int, default=512, help="tokens of a piece")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer", action="store_true", help="run llama.cpp on the same text")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.model or ["smollm2-135m", "qwen2.5-coder-0.5b"]:
        files = loader.resolve(name)
        checkpoint = loader.open_checkpoint(files)
        tokenizer = loader.Tokenizer(files.tokenizer_dir)
        words = text()
        tokens = tokenizer.encode(words)
        assert len(tokens) >= options.tokens, "the text is shorter than that"
        tokens = tokens[: options.tokens]
        models = [
            load(checkpoint, exact=exact, dtype=dtype, threads=options.threads, kv=kv)
            for exact, dtype, kv in (
                (False, torch.bfloat16, None),
                (False, torch.bfloat16, "int8"),
                (False, torch.float32, None),
                (True, torch.float32, None),
            )
        ]
        losses, divergences = measure(models, tokens, options.context)
        ours, rounded, wide, oracle = losses.mean(1).exp().tolist()
        chance = ((losses[0] - losses[3]).std() / losses.shape[1] ** 0.5).item()
        peer = None
        if options.peer:
            pieces = len(tokens) // options.context
            peer = of_llama(files.path, words, pieces, options.context, options.threads)
        off = ours / oracle - 1
        print(
            f"{name}: {ours:.4f} ({off:+.3%} +- {chance:.3%}, divergence {divergences[0]:.6f}); "
            f"KV in INT8 {rounded:.4f} ({rounded / oracle - 1:+.3%}, divergence "
            f"{divergences[1]:.6f}); "
            f"native in float32 {wide:.4f} ({wide / oracle - 1:+.3%}, divergence "
            f"{divergences[2]:.6f}); oracle {oracle:.4f}; "
            f"llama.cpp {'not run' if peer is None else f'{peer:.4f}'}",
            flush=True,
        )
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": __version__,
            "model": name,
            "tokens": len(tokens),
            "context": options.context,
            "ours": ours,
            "kv_int8": rounded,
            "native_float32": wide,
            "float32": oracle,
            "standard_error": chance,
            "divergence": divergences[0].item(),
            "kv_int8_divergence": divergences[1].item(),
            "native_float32_divergence": divergences[2].item(),
            "llama.cpp": peer,
        }
        with HISTORY.open("a") as history:
            print(json.dumps(line), file=history)


if __name__ == "__main__":
    main()
