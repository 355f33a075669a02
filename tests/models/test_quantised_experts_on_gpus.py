"""On a GPU experts of quantised checkpoints stay as they are: with its kernels interpreted, a model
gives what its dequantised weights give, and of two ranks each holds its share."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

from tests.kernels.triton_cases import interpreting
from tests.models.test_packed_experts import EXPERTS, FEATURES, KINDS, LAYERS, SIZES, write
from tests.models.test_quantised_on_gpus import on_gpu
from tests.models.test_tiny_models import assert_close, prompt
from tests.models.tiny import build
from tests.support.forward import Driver
from tests.support.quantising import pack_fp8
from tests.support.triton_interpreter import needs_interpreter
from tests.unit.loader.test_quantised import FP8
from tokenspeed.distributed import Mesh
from tokenspeed.kernels import QuantisedWeight
from tokenspeed.modeling import Model

pytestmark = needs_interpreter
__all__ = ["interpreting"]

# Bits of a number with its share of scales, at most.
BITS = {"compressed-tensors": 4.5, "awq": 4.5, "gptq": 4.5, "mxfp4": 4.25, "fp8": 8.2}


@pytest.fixture(autouse=True)
def fp8_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPUs have no format of their own for it."""
    config = Qwen3MoeConfig(
        # All of them, so that rounded activations cannot send a token elsewhere.
        **{**SIZES, "num_experts_per_tok": EXPERTS},
        num_experts=EXPERTS,
        moe_intermediate_size=FEATURES,
        norm_topk_prob=True,
    )
    scheme = {**FP8, "weight_block_size": [32, 32]}
    kind = (config, scheme, lambda values: pack_fp8(values, (32, 32)), BITS["fp8"])
    monkeypatch.setitem(KINDS, "fp8", kind)
    yield


def experts_of(model: Model) -> dict[str, QuantisedWeight]:
    return {
        key: weight.data  # type: ignore[misc]
        for key, weight in model.weights()
        if key.endswith(("experts.gate_up", "experts.down"))
    }


def values_of(weight: QuantisedWeight, experts: int) -> torch.Tensor:
    (matrix,) = weight.matrices
    values = matrix if isinstance(matrix, torch.Tensor) else matrix.to_float()
    return values.view(experts, -1, values.shape[1])


@pytest.mark.parametrize("name", BITS)
def test_experts_of_a_quantised_model_on_a_gpu_are_its_numbers_as_they_are(
    tmp_path: Path, name: str
) -> None:
    tensors = write(name, tmp_path)
    plain = build(json.loads((tmp_path / "config.json").read_text()))
    plain.load_weights(tensors.items())
    exact: dict[str, torch.Tensor] = {key: weight.data for key, weight in plain.weights()}  # type: ignore[misc]
    tokens = [token % 64 for token in prompt(6, seed=1)]
    wanted = Driver(plain).prefill(tokens, chunk=4)

    model = on_gpu(tmp_path, Mesh(), 0)
    held = experts_of(model)
    assert len(held) == 2 * LAYERS
    for key, weight in held.items():
        assert torch.equal(values_of(weight, EXPERTS), exact[key]), key
    # One expert has a part that is not quantised, where the format allows that.
    mixed = held.pop("blocks.1.mlp.experts.gate_up")
    assert isinstance(mixed.matrices[0], torch.Tensor) == (name != "mxfp4")
    for weight in held.values():
        assert not isinstance(weight.matrices[0], torch.Tensor)
        numbers = weight.shape[0] * weight.shape[1]
        outputs_size_bytes = 4 * weight.shape[0] * (name == "fp8")
        assert 4 <= 8 * (weight.nbytes - outputs_size_bytes) / numbers <= BITS[name] + 0.25
    found = Driver(model).prefill(tokens, chunk=4)
    if name == "fp8":
        # Activations are rounded there, too.
        assert (found - wanted).norm() < 0.1 * wanted.norm()
    else:
        assert_close(found, wanted)


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=2, ep=2)], ids=["tp", "ep"])
@pytest.mark.parametrize("name", ["gptq", "mxfp4", "fp8"])
def test_two_ranks_hold_their_shares_of_quantised_experts(
    tmp_path: Path, name: str, mesh: Mesh
) -> None:
    write(name, tmp_path)
    whole = experts_of(on_gpu(tmp_path, Mesh(), 0))
    half = FEATURES // 2
    for rank in range(2):
        share = experts_of(on_gpu(tmp_path, mesh, rank))
        for key, weight in whole.items():
            values = values_of(weight, EXPERTS)
            if mesh.ep == 2:
                mine = values.chunk(2)[rank]
            elif key.endswith("down"):
                mine = values[..., rank * half : (rank + 1) * half]
            else:
                gates, ups = values.chunk(2, dim=1)
                part = slice(rank * half, (rank + 1) * half)
                mine = torch.cat((gates[:, part], ups[:, part]), dim=1)
            assert torch.equal(values_of(share[key], EXPERTS // mesh.ep), mine), (key, rank)
