"""Real weights, packed: as good as dequantised ones, at a fraction of their size.

Legend: T tokens, V vocabulary.
"""

import pytest
import torch

from tests.models.test_gguf_models import TEXT, relative_error
from tests.support.forward import Driver
from tokenspeed import loader
from tokenspeed.kernels import PACKED, QUANTISED_ROWS, KernelSelector, PackedWeight
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.modeling import Model, ModelConfig, build_model

MODELS = ["smollm2-135m", pytest.param("qwen2.5-coder-0.5b", marks=pytest.mark.slow)]
REFERENCE = dict.fromkeys(("gemm.linear", "gemm.logits", "embedding.lookup"), "reference")


def load(
    checkpoint: loader.Checkpoint,
    *,
    overrides: dict[str, str] | None = None,
    threads: int = 1,
    fused: bool = True,
) -> Model:
    device, dtype = torch.device("cpu"), torch.float32
    kernels = KernelSelector(
        device=device,
        dtype=dtype,
        overrides=overrides,
        weight_formats=(PACKED, "float32"),
        activation_formats=(QUANTISED_ROWS,) if fused else None,
        kv_formats=("interleaved_float32", "float32"),
        runtime=start_runtime(threads=threads),
    )
    config = ModelConfig.from_hf(checkpoint.hf_config)
    model = build_model(config, dtype=dtype, device=device, kernels=kernels)
    model.load_weights(checkpoint.blocks())
    return model


@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_give_the_logits_of_dequantised_ones(name: str) -> None:
    files = loader.resolve(name)
    checkpoint = loader.open_checkpoint(files)
    tokens = loader.Tokenizer(files.tokenizer_dir).encode(TEXT)

    exact = load(checkpoint, overrides=REFERENCE)
    expected_TV = Driver(exact).prefill(tokens, chunk=48)
    dense_size_bytes = exact.weights_size_bytes
    del exact
    packed = load(checkpoint, threads=2)
    found_TV = Driver(packed).prefill(tokens, chunk=48)

    assert packed.weights_size_bytes <= 1.06 * checkpoint.size_bytes < dense_size_bytes / 3
    matrices = [w for _, w in packed.weights() if len(w.shape) == 2]
    assert all(isinstance(weight.data, PackedWeight) for weight in matrices)
    # Inputs rounded to bytes: an error of half a percent for each product, some 200 of them.
    error = relative_error(found_TV, expected_TV)
    print(f"relative error of the logits: {error:.4f}")
    assert error <= 5e-2
    same = (found_TV.argmax(-1) == expected_TV.argmax(-1)).float().mean()
    assert same >= 0.9, f"only {same:.0%} of the likeliest tokens are the same"


def test_rows_quantised_by_their_producer_give_the_logits_of_float32_rows() -> None:
    checkpoint = loader.open_checkpoint(loader.resolve("smollm2-135m"))
    tokens = list(range(500, 570))
    models = [load(checkpoint, threads=2, fused=fused) for fused in (True, False)]
    assert [model.head.reads for model in models] == [(QUANTISED_ROWS,), ()]  # type: ignore[attr-defined]
    whole_TV, expected_TV = (Driver(model).prefill(tokens, chunk=70) for model in models)
    assert torch.equal(whole_TV, expected_TV)
    assert torch.equal(Driver(models[0]).prefill(tokens, chunk=9), expected_TV)
