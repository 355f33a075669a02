"""One user of the same model through transformers: static cache, `torch.compile`, greedy steps.

    python -m benchmarks.support.gpu_transformers

Prints one line of JSON. What `gpu_step` measures of ours stands beside it.
"""

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.support.gpu_sizes import LLAMA_3_8B, STEPS, WARM_STEPS

__all__ = ["one_user_of_transformers"]


def one_user_of_transformers(
    device: torch.device,
    *,
    sizes: dict[str, Any] = LLAMA_3_8B,
    depth: int = 8192,
    compiled: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Tokens a second of one user.

    Args:
        device: where.
        sizes: the model's configuration; its weights are random.
        depth: tokens before the first step.
        compiled: whether `torch.compile` makes graphs of the steps.
        dtype: of weights and KV.
    """
    import transformers  # noqa: PLC0415

    config = transformers.LlamaConfig(
        **{name: value for name, value in sizes.items() if name not in {"architectures"}}
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    length = depth + WARM_STEPS + STEPS + 1
    asked = {
        "config": config,
        "max_batch_size": 1,
        "max_cache_len": length,
        "device": device,
        "dtype": dtype,
    }
    cache = transformers.StaticCache(**_known(transformers.StaticCache, asked))
    forward: Callable[..., Any] = model.forward

    def step(token_ids: torch.Tensor, position: int) -> torch.Tensor:
        positions = torch.arange(position, position + token_ids.shape[1], device=device)
        found = forward(
            input_ids=token_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            position_ids=positions[None],
            **_known(model.forward, {"cache_position": positions}),
        )
        chosen: torch.Tensor = found.logits[:, -1].argmax(-1, keepdim=True)
        return chosen

    generator = torch.Generator(device).manual_seed(1)
    prompt = torch.randint(0, sizes["vocab_size"], (1, depth), device=device, generator=generator)
    times = []
    with torch.inference_mode():
        token = step(prompt, 0)
        if compiled:
            forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        for number in range(WARM_STEPS + STEPS):
            _wait(device)
            start = time.perf_counter()
            # Its memory is the graph's, which the next step writes to.
            token = step(token, depth + number).clone()
            _wait(device)
            times.append(time.perf_counter() - start)
    step_s = statistics.median(times[WARM_STEPS:])
    return {
        "depth": depth,
        "step_us": step_s * 1e6,
        "tokens_per_s": 1 / step_s,
        "transformers": transformers.__version__,
    }


def _known(call: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that this version has by name."""
    names = inspect.signature(call).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """The command; see above."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(json.dumps(one_user_of_transformers(torch.device("cuda"))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
