"""On a CPU quantised safetensors stay packed: layers hold the numbers of the checkpoint to the bit,
in as much memory as they take there or little more."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import Store
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.kernels.test_packed_groups import rows_of
from tests.models.test_quantised_models import quantised
from tests.models.test_tiny_models import prompt
from tests.models.tiny import build
from tests.support.forward import Driver
from tests.support.quantising import Packed, pack_awq, pack_compressed, pack_gptq
from tests.support.ranks import in_threads
from tests.unit.loader.test_quantised import AWQ, GPTQ, INT4, changed
from tokenspeed import loader
from tokenspeed.distributed import Mesh
from tokenspeed.engine.assembly import packed_formats
from tokenspeed.engine.outline import outline
from tokenspeed.kernels import KernelSelector, PackedGroups
from tokenspeed.kernels.cpu import CpuRuntime
from tokenspeed.modeling import Model, ModelConfig, build_model

CPU = torch.device("cpu")
SIZES = LlamaConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    initializer_range=0.1,
    tie_word_embeddings=False,
)
# What config.json says, how a matrix is packed, and bits of a number as it is held.
KINDS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Packed], float]] = {
    "compressed-tensors": (
        changed(INT4, group_size=64),
        lambda values: pack_compressed(values, 64, symmetric=True),
        4.5,
    ),
    "awq": (AWQ, lambda values: pack_awq(values, 32), 5.5),
    "gptq": (GPTQ, lambda values: pack_gptq(values, 64), 5.5),
}


def native(
    path: Path,
    mesh: Mesh,
    rank: int,
    store: Store | None,
    *,
    runtime: CpuRuntime | None = None,
) -> Model:
    checkpoint = loader.open_checkpoint(loader.resolve(str(path)))
    model = build_model(
        ModelConfig.from_hf(checkpoint.hf_config),
        dtype=torch.float32,
        device=CPU,
        kernels=KernelSelector(
            device=CPU,
            dtype=torch.float32,
            weight_formats=(*packed_formats(checkpoint.packed_format), "float32_panels", "float32"),
            kv_formats=("interleaved_float32",),
            runtime=runtime,
        ),
        mesh=mesh,
        rank=rank,
        store=store,
    )
    model.load_weights(checkpoint.blocks())
    return model


@pytest.mark.parametrize("name", KINDS)
def test_a_quantised_model_on_a_cpu_holds_its_numbers_as_they_are(
    tmp_path: Path, name: str
) -> None:
    scheme, pack, bits = KINDS[name]
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(SIZES).save_pretrained(tmp_path)
    plain = build(json.loads((tmp_path / "config.json").read_text()))
    # One projection of each layer stays as it was, as checkpoints leave some.
    tensors = quantised(
        tmp_path, scheme, lambda key: key.endswith("proj.weight") and "v_proj" not in key, pack
    )
    plain.load_weights(tensors.items())
    tokens = [token % 64 for token in prompt(40, seed=1)]
    wanted = Driver(plain).prefill(tokens, chunk=16)

    model = native(tmp_path, Mesh(), 0, None)
    held = {key: weight.data for key, weight in model.weights()}
    exact = {key: weight.data for key, weight in plain.weights()}
    groups = {key: data for key, data in held.items() if isinstance(data, PackedGroups)}
    assert len(groups) == 4 * SIZES.num_hidden_layers
    for key, data in groups.items():
        theirs = exact[key]
        assert isinstance(theirs, torch.Tensor)
        assert torch.equal(rows_of(model.kernels.runtime, data, data.shape[1]), theirs)
    # The projection that was left is dense.
    assert len(groups["blocks.0.attention.qkv.weight"].runs) == 2
    assert groups["blocks.1.mlp.down.weight"].nbytes == 128 * 256 * bits / 8
    planned = outline(str(tmp_path), Mesh(), dtype="float32").weights_size_bytes
    assert model.weights_size_bytes <= planned < 1.5 * model.weights_size_bytes

    found = Driver(model).prefill(tokens, chunk=16)
    # Inputs are rounded to bytes, as for weights of GGUF files.
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert torch.equal(Driver(model).prefill(tokens, chunk=7), found)

    def run(rank: int, store: Store) -> tuple[torch.Tensor, int]:
        share = native(tmp_path, Mesh(tp=2), rank, store)
        return Driver(share).prefill(tokens, chunk=16), share.weights_size_bytes

    for logits, size_bytes in in_threads(2, run):
        assert (logits - wanted).norm() < 0.03 * wanted.norm()
        assert size_bytes < 0.6 * model.weights_size_bytes
