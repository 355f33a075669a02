"""On a GPU quantised weights stay as they are in the checkpoint: with its kernels interpreted, a
model gives what its dequantised weights give, and of two ranks each holds its share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.kernels.triton_cases import GPU, interpreting
from tests.models.test_quantised_models import quantised
from tests.models.test_tiny_models import assert_close, prompt
from tests.models.tiny import build
from tests.support.forward import Driver
from tests.support.quantising import Packed, pack_awq, pack_compressed, pack_fp8, pack_gptq
from tests.support.triton_interpreter import needs_interpreter
from tests.unit.loader.test_quantised import AWQ, FP8, GPTQ, INT4, changed
from tokenspeed import loader
from tokenspeed.core.errors import KernelError
from tokenspeed.distributed import Mesh
from tokenspeed.kernels import KernelSelector, QuantisedWeight
from tokenspeed.modeling import Model, ModelConfig, build_model
from tokenspeed.modeling.module import Weight

pytestmark = needs_interpreter
__all__ = ["interpreting"]

CPU = torch.device("cpu")
SIZES = LlamaConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
KINDS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Packed], float]] = {
    "awq": (AWQ, lambda values: pack_awq(values, 32), 0.5),
    "gptq": (GPTQ, lambda values: pack_gptq(values, 64), 0.5),
    "compressed-tensors": (
        changed(INT4, group_size=32),
        lambda values: pack_compressed(values, 32, symmetric=True),
        0.5,
    ),
    "fp8": (
        {**FP8, "weight_block_size": [32, 32]},
        lambda values: pack_fp8(values, (32, 32)),
        1.0,
    ),
}
"""By name: what config.json says, how a matrix is packed, and bytes of a number."""


def on_gpu(path: Path, mesh: Mesh, rank: int) -> Model:
    checkpoint = loader.open_checkpoint(loader.resolve(str(path)))
    assert checkpoint.packed_format is not None
    model = build_model(
        ModelConfig.from_hf(checkpoint.hf_config),
        dtype=torch.float32,
        device=CPU,
        kernels=KernelSelector(
            device=CPU,
            dtype=torch.float32,
            platform=GPU,
            weight_formats=(checkpoint.packed_format, "float32"),
        ),
        mesh=mesh,
        rank=rank,
    )
    planned = model.planned_size_bytes(checkpoint.size_bytes, plain=checkpoint.plain_names)
    model.load_weights(checkpoint.blocks())
    assert model.weights_size_bytes <= planned
    return model


@pytest.mark.parametrize("name", KINDS)
def test_a_quantised_model_on_a_gpu_gives_what_its_dequantised_weights_give(
    tmp_path: Path, name: str
) -> None:
    scheme, pack, number_size_bytes = KINDS[name]
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(SIZES).save_pretrained(tmp_path)
    plain = build(json.loads((tmp_path / "config.json").read_text()))
    # One projection of each layer stays as it was, as checkpoints leave some.
    tensors = quantised(
        tmp_path,
        scheme,
        lambda key: key.endswith("proj.weight") and "v_proj" not in key,
        pack,
    )
    plain.load_weights(tensors.items())
    tokens = [token % 61 for token in prompt(12, seed=1)]
    wanted = Driver(plain).prefill(tokens, chunk=8)

    model = on_gpu(tmp_path, Mesh(), 0)
    weights = dict(model.weights())
    down = next(weight for key, weight in weights.items() if key.endswith("down.weight"))
    assert isinstance(down.data, QuantisedWeight)
    numbers = 64 * 256 * number_size_bytes
    assert numbers < down.size_bytes <= 1.2 * numbers
    found = Driver(model).prefill(tokens, chunk=8)
    if name == "fp8":
        # Activations are rounded there, too.
        assert (found - wanted).norm() < 0.1 * wanted.norm()
    else:
        assert_close(found, wanted)

    for rank in range(2):
        share = dict(on_gpu(tmp_path, Mesh(tp=2), rank).weights())
        half = slice(rank * 128, (rank + 1) * 128)
        stem = "model.layers.0.mlp"
        down_OI = tensors[f"{stem}.down_proj.weight"][:, half]
        up_OI = tensors[f"{stem}.up_proj.weight"][half]
        gate_OI = tensors[f"{stem}.gate_proj.weight"][half]
        assert torch.equal(values_of(share["blocks.0.mlp.down.weight"]), down_OI)
        gate_up_OI = torch.cat((gate_OI, up_OI))
        assert torch.equal(values_of(share["blocks.0.mlp.gate_up.weight"]), gate_up_OI)


def values_of(weight: Weight) -> torch.Tensor:
    assert isinstance(weight.data, QuantisedWeight)
    (matrix,) = weight.data.matrices
    assert not isinstance(matrix, torch.Tensor)
    return matrix.to_float()


def test_a_weight_of_which_a_part_is_missing_is_not_used() -> None:
    weight = QuantisedWeight(
        (8, 32), format_name="int4_groups", parts=(4, 4), dtype=torch.float32, device=CPU
    )
    weight.pack_dense(0, torch.ones(4, 32))
    with pytest.raises(KernelError, match="before all of its parts"):
        _ = weight.matrices
