"""On a CPU experts of quantised safetensors stay packed, to the bit, of each rank its share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import Store
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

from tests.kernels.test_packed_groups import rows_of
from tests.models.test_packed_groups import native
from tests.models.test_quantised_models import quantised
from tests.models.test_tiny_models import prompt
from tests.models.tiny import build
from tests.support.forward import Driver
from tests.support.quantising import Packed, pack_awq, pack_compressed, pack_gptq, pack_mxfp4
from tests.support.ranks import in_threads
from tests.unit.loader.test_quantised import AWQ, GPTQ, INT4, MXFP4, changed
from tokenspeed.distributed import Mesh
from tokenspeed.engine.outline import outline
from tokenspeed.kernels import PackedGroups
from tokenspeed.kernels.cpu import start_runtime
from tokenspeed.modeling import Model

LAYERS, EXPERTS, HIDDEN, FEATURES = 2, 4, 64, 256
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
QWEN = Qwen3MoeConfig(
    **SIZES, num_experts=EXPERTS, moe_intermediate_size=FEATURES, norm_topk_prob=True
)
GPT_OSS = GptOssConfig(
    # All of them, so that a last bit cannot send a token elsewhere.
    **{**SIZES, "num_experts_per_tok": EXPERTS},
    num_local_experts=EXPERTS,
    intermediate_size=FEATURES,
    swiglu_limit=1.5,
    sliding_window=9,
)
# The model, what config.json says, how a matrix is packed, and bits of a number as it is held.
KINDS: dict[str, tuple[Any, dict[str, Any], Callable[[torch.Tensor], Packed], float]] = {
    "compressed-tensors": (
        QWEN,
        changed(INT4, group_size=32),
        lambda values: pack_compressed(values, 32, symmetric=True),
        4.5,
    ),
    "awq": (QWEN, AWQ, lambda values: pack_awq(values, 64), 5.5),
    # One scale for all inputs of an output, which two ranks share.
    "gptq": (QWEN, GPTQ, lambda values: pack_gptq(values, values.shape[1]), 5.5),
    "mxfp4": (GPT_OSS, MXFP4, pack_mxfp4, 5.5),
}


def write(name: str, path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint whose experts are quantised, of which one has a part that is not, where its
    format allows that; gives what its tensors stand for."""
    config, scheme, pack, _ = KINDS[name]
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)

    def chosen(key: str) -> bool:
        return ".experts." in key and "bias" not in key and "layers.1.mlp.experts.2.up" not in key

    return quantised(path, scheme, chosen, pack)


def experts_of(model: Model) -> dict[str, tuple[PackedGroups, ...]]:
    return {
        key: weight.data
        for key, weight in model.weights()
        if key.endswith(("experts.gate_up", "experts.down"))
    }


@pytest.mark.parametrize("name", KINDS)
def test_experts_of_a_quantised_model_on_a_cpu_are_its_numbers_as_they_are(
    tmp_path: Path, name: str
) -> None:
    bits = KINDS[name][-1]
    tensors = write(name, tmp_path)
    plain = build(json.loads((tmp_path / "config.json").read_text()))
    plain.load_weights(tensors.items())
    exact: dict[str, torch.Tensor] = {key: weight.data for key, weight in plain.weights()}  # type: ignore[misc]
    tokens = [token % 64 for token in prompt(40, seed=1)]
    wanted = Driver(plain).prefill(tokens, chunk=16)

    model = native(tmp_path, Mesh(), 0, None)
    held = experts_of(model)
    assert len(held) == 2 * LAYERS
    for key, matrices in held.items():
        assert len(matrices) == EXPERTS
        for matrix, theirs in zip(matrices, exact[key], strict=True):
            assert not matrix.dequantised
            found = rows_of(model.kernels.runtime, matrix, matrix.shape[1])
            assert torch.equal(found, theirs)
    assert held["blocks.0.mlp.experts.gate_up"][1].nbytes == 2 * FEATURES * HIDDEN * bits / 8
    assert held["blocks.0.mlp.experts.down"][1].nbytes == FEATURES * HIDDEN * bits / 8
    planned = outline(str(tmp_path), Mesh(), dtype="float32").weights_size_bytes
    assert model.weights_size_bytes <= planned < 1.5 * model.weights_size_bytes
    # One part in a matrix may be as it was.
    mixed = held["blocks.1.mlp.experts.gate_up"][2]
    assert [matrix.format for matrix in mixed.matrices][1:] == ["w5" if name == "mxfp4" else "f32"]

    found = Driver(model).prefill(tokens, chunk=16)
    # Inputs are rounded to bytes, as for weights of GGUF files.
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert torch.equal(Driver(model).prefill(tokens, chunk=7), found)
    other = native(tmp_path, Mesh(), 0, None, runtime=start_runtime(threads=3))
    assert torch.equal(Driver(other).prefill(tokens, chunk=40), found)


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=2, ep=2)], ids=["tp", "ep"])
@pytest.mark.parametrize("name", ["gptq", "mxfp4"])
def test_two_ranks_hold_their_shares_of_packed_experts(
    tmp_path: Path, name: str, mesh: Mesh
) -> None:
    write(name, tmp_path)
    model = native(tmp_path, Mesh(), 0, None)
    tokens = [token % 64 for token in prompt(40, seed=1)]
    wanted = Driver(model).prefill(tokens, chunk=16)

    def run(rank: int, store: Store) -> tuple[torch.Tensor, Model]:
        share = native(tmp_path, mesh, rank, store)
        return Driver(share).prefill(tokens, chunk=16), share

    def rows(of: Model, key: str, expert: int) -> torch.Tensor:
        matrix = experts_of(of)[key][expert]
        return rows_of(of.kernels.runtime, matrix, matrix.shape[1])

    ranks = in_threads(2, run)
    for logits, _ in ranks:
        assert torch.equal(logits, ranks[0][0])
        assert (logits - wanted).norm() < 0.03 * wanted.norm()
    first = ranks[0][1].weights_size_bytes
    planned = outline(str(tmp_path), mesh, dtype="float32").weights_size_bytes
    assert first <= planned < 1.5 * first
    for key in experts_of(model):
        for expert in range(EXPERTS):
            whole = rows(model, key, expert)
            if mesh.ep == 2:
                holder = ranks[expert * 2 // EXPERTS][1]
                assert torch.equal(rows(holder, key, expert % (EXPERTS // 2)), whole)
                continue
            shares = [rows(share, key, expert) for _, share in ranks]
            formats = {matrix.format for matrix in experts_of(ranks[1][1])[key][expert].matrices}
            assert formats == {"w5"} or (name, expert) == ("gptq", 2)
            if key.endswith("down"):
                assert torch.equal(torch.cat(shares, 1), whole)
            else:
                halves = [half for share in shares for half in share.chunk(2)]
                assert torch.equal(torch.cat((*halves[::2], *halves[1::2])), whole)


def test_scales_that_no_packed_format_has_are_told_and_held_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    write("mxfp4", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.experts.down_proj_scales"][1, 5, 0] = 100
    save_file(stored, tmp_path / "model.safetensors")
    model = native(tmp_path, Mesh(), 0, None)
    assert "1 quantised matrices take the memory of dense ones" in caplog.text
    assert [
        matrix.format for matrix in experts_of(model)["blocks.0.mlp.experts.down"][1].matrices
    ] == ["f32"]
    found = Driver(model).prefill([5, 6, 7], chunk=2)
    assert torch.isfinite(found).all()
