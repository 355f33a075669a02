"""Hugging Face directories: whole ones are read, every other kind says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tokenspeed import loader
from tokenspeed.core.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _directory(path: Path, config: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return path


def _open(path: Path) -> loader.Checkpoint:
    return loader.open_checkpoint(loader.resolve(str(path)))


def _sharded(path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {f"t{i}": torch.randn(4, 3, generator=generator) for i in range(5)}
    _directory(path)
    shards = {"model-1.safetensors": ["t0", "t3"], "model-2.safetensors": ["t1", "t2", "t4"]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, path / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_a_single_file_is_read_in_the_types_it_has(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "b": torch.ones(4, dtype=torch.float16),
        "c": torch.rand(2),
    }
    save_file(tensors, _directory(tmp_path) / "model.safetensors")
    checkpoint = _open(tmp_path)
    found = dict(checkpoint.tensors())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert (checkpoint.tensor_count, checkpoint.size_bytes) == (3, 12 + 8 + 8)
    assert checkpoint.quantisation == "BF16"
    assert checkpoint.hf_config == CONFIG


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    tensors = _sharded(tmp_path)
    checkpoint = _open(tmp_path)
    found = dict(checkpoint.tensors())
    assert checkpoint.tensor_count == 5
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"lacks 1 of its 2 files.*model-2\.safetensors"):
        _open(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    tensors = _sharded(tmp_path)
    save_file({"t0": tensors["t0"]}, tmp_path / "model-1.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"lacks 1 tensors that the index places there.*t3"):
        _open(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, None, {"t0": "../secret.safetensors"}, {"t0": 3}])
def test_an_index_that_cannot_be_is_corrupt(tmp_path: Path, weight_map: object) -> None:
    path = tmp_path / "model"
    _sharded(path)
    # Outside the folder, and otherwise fine.
    save_file({"t0": torch.ones(2)}, tmp_path / "secret.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpoint, match=r"names the file|has no weight_map"):
        _open(path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_corrupt(tmp_path: Path, keep: int) -> None:
    _sharded(tmp_path)
    path = tmp_path / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptCheckpoint, match=r"model-1\.safetensors is damaged or truncated"):
        _open(tmp_path)


def test_integer_weights_are_unsupported(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.int8)}, _directory(tmp_path) / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"'a'.*I8.*F32, F16, BF16"):
        _open(tmp_path)


def test_a_quantisation_that_is_not_read_is_unsupported(tmp_path: Path) -> None:
    _directory(tmp_path, CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(UnsupportedModel, match=r"'bitsandbytes'.*GGUF"):
        _open(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_never_opened(tmp_path: Path, file: str) -> None:
    (_directory(tmp_path) / file).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedModel, match=f"pickled weights .{file}.*safetensors"):
        _open(tmp_path)
    with pytest.raises(UnsupportedModel, match="pickled"):
        loader.resolve(str(tmp_path / file))


def test_a_directory_without_weights_or_configuration_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        loader.resolve(str(tmp_path))
    _directory(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"neither model\.safetensors nor"):
        _open(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CorruptCheckpoint, match="should hold a JSON object"):
        _open(tmp_path)


def test_sampling_defaults_count_only_where_sampling_is_the_default(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, _directory(tmp_path) / "model.safetensors")
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "eos_token_id": 3}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(settings))
    assert _open(tmp_path).sampling_defaults == {}
    path.write_text(json.dumps(settings | {"do_sample": True}))
    assert _open(tmp_path).sampling_defaults == {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    path.write_text(json.dumps({"do_sample": True, "top_k": 0}))
    assert _open(tmp_path).sampling_defaults == {}
