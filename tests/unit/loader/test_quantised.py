"""Matrices of quantised safetensors checkpoints are what their numbers and scales stand for."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.quantising import (
    Packed,
    pack_awq,
    pack_compressed,
    pack_fp8,
    pack_gptq,
    pack_mxfp4,
)
from tokenspeed import loader
from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.kernels import QuantisedStored, Stored
from tokenspeed.kernels.quantised import Int4Groups

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 24],
}
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 24,
    "zero_point": True,
    "version": "gemm",
}
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 24,
    "desc_act": False,
    "sym": False,
}
INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 24,
                "symmetric": True,
            },
            "input_activations": None,
        }
    },
    "ignore": ["lm_head"],
}
MXFP4: dict[str, Any] = {"quant_method": "mxfp4"}

FORMATS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Packed]]] = {
    "fp8": (FP8, lambda values: pack_fp8(values, (16, 24))),
    "compressed-tensors": (INT4, lambda values: pack_compressed(values, 24, symmetric=True)),
    "compressed-tensors-zeros": (
        INT4,
        lambda values: pack_compressed(values, 24, symmetric=False),
    ),
    "gptq": (GPTQ, lambda values: pack_gptq(values, 24)),
    "gptq-v2": (
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        lambda values: pack_gptq(values, 24, version=2),
    ),
    "awq": (AWQ, lambda values: pack_awq(values, 24)),
}
"""By name: what config.json says, and how a matrix is packed."""


def write(path: Path, scheme: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": scheme}))
    save_file(tensors, path / "model.safetensors")
    return path


def opened(path: Path) -> loader.Checkpoint:
    return loader.open_checkpoint(loader.resolve(str(path)))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def assert_slices_are_of_the_whole(stored: Stored, exact: torch.Tensor) -> None:
    assert tuple(stored.shape) == exact.shape
    assert torch.equal(torch.as_tensor(stored[()]), exact)
    choose = random.Random(7)
    for _ in range(30):
        spans = []
        for size in exact.shape:
            first, end = sorted(choose.sample(range(size + 1), 2))
            spans.append(slice(first, end))
        assert torch.equal(torch.as_tensor(stored[tuple(spans)]), exact[tuple(spans)]), spans


@pytest.mark.parametrize("name", FORMATS)
def test_any_part_of_a_matrix_is_what_its_numbers_stand_for(tmp_path: Path, name: str) -> None:
    scheme, pack = FORMATS[name]
    parts, exact = pack(noise(40, 72))
    assert (exact - noise(40, 72)).norm() < 0.2 * exact.norm()
    plain = torch.ones(7, dtype=torch.bfloat16)
    stored = {f"model.a.{end}": part for end, part in parts.items()}
    checkpoint = opened(write(tmp_path, scheme, {**stored, "model.norm.weight": plain}))
    found = dict(checkpoint.blocks())
    assert found.keys() == {"model.a.weight", "model.norm.weight"}
    assert checkpoint.tensor_count == 2
    assert checkpoint.quantisation in ("FP8", "INT4", "GPTQ", "AWQ")
    for matrix, stored_matrix in checkpoint.blocks():
        if matrix == "model.a.weight":
            assert_slices_are_of_the_whole(stored_matrix, exact)
        else:
            assert torch.equal(torch.as_tensor(stored_matrix[()]), plain)


@pytest.mark.parametrize("name", ["compressed-tensors", "compressed-tensors-zeros", "gptq", "awq"])
def test_parts_of_groups_are_groups_with_the_same_scale(tmp_path: Path, name: str) -> None:
    pack: dict[str, Callable[[torch.Tensor], Packed]] = {
        "compressed-tensors": lambda values: pack_compressed(values, 192, symmetric=True),
        "compressed-tensors-zeros": lambda values: pack_compressed(values, 192, symmetric=False),
        "gptq": lambda values: pack_gptq(values, 192),
        "awq": lambda values: pack_awq(values, 192),
    }
    parts, exact = pack[name](noise(40, 384))
    stored = {f"a.{end}": part for end, part in parts.items()}
    ((_, matrix),) = opened(write(tmp_path, FORMATS[name][0], stored)).blocks()
    assert isinstance(matrix, QuantisedStored)
    spans = {(0, 64): 64, (64, 224): 32, (96, 384): 96, (128, 320): 64, (224, 352): 32}
    for (first, end), group in spans.items():
        found = matrix.quantised((slice(3, 21), slice(first, end)))
        assert isinstance(found, Int4Groups) and found.group == group
        assert torch.equal(found.to_float(), exact[3:21, first:end])
    assert matrix.quantised((slice(0, 40), slice(0, 72))) is None


def test_any_part_of_stacked_experts_of_mxfp4_is_what_its_numbers_stand_for(
    tmp_path: Path,
) -> None:
    parts, exact = pack_mxfp4(noise(3, 96, 20))
    stored = {f"model.experts.gate_up_proj{end}": part for end, part in parts.items()}
    for name, matrix in opened(write(tmp_path, MXFP4, stored)).blocks():
        assert name == "model.experts.gate_up_proj"
        assert_slices_are_of_the_whole(matrix, exact)


def test_parts_of_a_matrix_may_lie_in_several_files(tmp_path: Path) -> None:
    parts, exact = pack_fp8(noise(40, 72), (16, 24))
    write(tmp_path, FP8, {})
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for number, (end, part) in enumerate(parts.items()):
        save_file({f"a.{end}": part}, tmp_path / f"{number}.safetensors")
        weight_map[f"a.{end}"] = f"{number}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ((name, values),) = opened(tmp_path).tensors()
    assert name == "a.weight"
    assert torch.equal(values, exact)


def changed(scheme: dict[str, Any], **weights: object) -> dict[str, Any]:
    group = scheme["config_groups"]["group_0"]
    groups = {"group_0": {**group, "weights": {**group["weights"], **weights}}}
    return {**scheme, "config_groups": groups}


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"'bitsandbytes'; supported are fp8.*gptq.*GGUF"),
        ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2'; fmt 'e4m3' is supported"),
        ({**FP8, "activation_scheme": "static"}, "'dynamic' is supported"),
        ({**FP8, "weight_block_size": None}, r"\[128, 128\]"),
        ({**AWQ, "bits": 8}, "awq with bits 8; bits 4 is supported"),
        ({**AWQ, "version": "gemv"}, "version 'gemm'"),
        ({**AWQ, "zero_point": False}, "zero_point True is supported"),
        ({**GPTQ, "bits": 3}, "gptq with bits 3; bits 4 is supported"),
        ({**GPTQ, "desc_act": True}, "desc_act False is supported"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'gptq' or 'gptq_v2'"),
        ({**INT4, "format": "float-quantized"}, "'pack-quantized' is supported"),
        (changed(INT4, num_bits=8), r"\(group_0\) with num_bits 8; num_bits 4"),
        (changed(INT4, type="float"), "type 'int' is supported"),
        (changed(INT4, strategy="tensor"), "'group' or 'channel'"),
        (changed(INT4, actorder="group"), "actorder"),
    ],
)
def test_what_is_not_read_is_refused_with_what_is(
    tmp_path: Path, scheme: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        opened(write(tmp_path, scheme, {"a.weight": torch.ones(2, 2)}))


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_that_lacks_or_does_not_fit_is_named(tmp_path: Path, name: str) -> None:
    scheme, pack = FORMATS[name]
    parts, _ = pack(noise(40, 72))
    scales = next(end for end in parts if "scale" in end)
    stored = {f"a.{end}": part for end, part in parts.items()}
    short = {**stored, f"a.{scales}": stored[f"a.{scales}"][:1].contiguous()}
    with pytest.raises(CorruptCheckpoint, match=r"a\.weight: "):
        dict(opened(write(tmp_path, scheme, short)).blocks())
    main = next(iter(parts))
    alone = {f"a.{main}": stored[f"a.{main}"]}
    lacks = "says what its numbers" if name == "fp8" else f"a.{main} of a .* has no a."
    with pytest.raises(CorruptCheckpoint, match=lacks):
        opened(write(tmp_path, scheme, alone))
    del stored[f"a.{main}"]
    with pytest.raises(CorruptCheckpoint, match=f"belongs to a.{main}"):
        opened(write(tmp_path, scheme, stored))


def test_inputs_in_another_order_are_noticed(tmp_path: Path) -> None:
    parts, _ = pack_gptq(noise(40, 72), 24)
    stored = {f"a.{end}": part for end, part in parts.items()}
    stored["a.g_idx"] = stored["a.g_idx"].flip(0).contiguous()
    with pytest.raises(CorruptCheckpoint, match="desc_act"):
        dict(opened(write(tmp_path, GPTQ, stored)).blocks())
