"""Every block format gives the bits that ggml's own Python package gives."""

import itertools
import mmap
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.unit.loader import tiny_gguf
from tokenspeed import loader
from tokenspeed.core.errors import CorruptCheckpoint
from tokenspeed.kernels.dequantise import dequantise_blocks
from tokenspeed.loader.dequantise import CHUNK_ELEMENTS, read_blocks
from tokenspeed.loader.gguf_file import QUANT_TYPES, GGUFFile


@pytest.mark.parametrize("name", [quant.name for quant in QUANT_TYPES.values()])
def test_blocks_dequantise_as_the_stock_package_has_it(name: str) -> None:
    seed = sum(name.encode())
    rng = np.random.default_rng(seed)
    kind = gguf.GGMLQuantizationType[name]
    _, block_size_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (500, block_size_bytes), dtype=np.uint8)
    # Random bytes make infinities and NaNs of scales too; those compare as they are.
    with np.errstate(invalid="ignore", over="ignore"):
        expected = gguf.quants.dequantize(raw.copy(), kind)
    found = dequantise_blocks(torch.from_numpy(raw), name).numpy()
    np.testing.assert_array_equal(found, expected, err_msg=f"seed {seed}")


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_what_was_quantised_comes_back_near(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    value = rng.standard_normal((6, 128), dtype=np.float32)
    kind = gguf.GGMLQuantizationType[name]
    blocks = gguf.quants.quantize(value, kind)
    path = tiny_gguf.write(tmp_path / "a.gguf", {}, raw={"w": (blocks, kind)})
    tensor = GGUFFile.open(path).tensors["w"]
    found = read_blocks(mapped(path), tensor).to_float()
    assert found.shape == (6, 128)
    assert found.dtype == torch.float32
    bits = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5}.get(name, 8)
    assert np.abs(found.numpy() - value).max() <= np.abs(value).max() * 1.1 / 2 ** (bits - 1)


def test_a_tensor_of_many_chunks_is_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows = 2 * CHUNK_ELEMENTS // 1024 + 3
    blocks = rng.integers(0, 100, (rows, 1024 // 32 * 34), dtype=np.uint8)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = tiny_gguf.write(tmp_path / "a.gguf", {}, raw={"w": (blocks, kind)})
    tensor = GGUFFile.open(path).tensors["w"]
    found = read_blocks(mapped(path), tensor).to_float()
    np.testing.assert_array_equal(found.numpy(), gguf.quants.dequantize(blocks, kind))


def test_a_file_that_shrinks_after_it_was_opened_is_corrupt(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "a.gguf", {"w": np.ones((64, 64), dtype=np.float32)})
    tensor = GGUFFile.open(path).tensors["w"]
    with path.open("r+b") as file:
        file.truncate(tensor.offset + 100)
    with pytest.raises(CorruptCheckpoint, match="ended within"):
        read_blocks(mapped(path), tensor)


def _assert_first_of_each_type_equals_stock(path: Path) -> None:
    ours = GGUFFile.open(path)
    stock = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    small = sorted(ours.tensors.values(), key=lambda tensor: (tensor.quant.name, tensor.elements))
    for _, of_type in itertools.groupby(small, key=lambda tensor: tensor.quant.name):
        for tensor in itertools.islice(of_type, 3):
            data = stock[tensor.name].data
            expected = gguf.quants.dequantize(data, stock[tensor.name].tensor_type)
            found = read_blocks(mapped(path), tensor).to_float()
            np.testing.assert_array_equal(found.numpy(), expected)


def test_the_real_llama_dequantises_as_the_stock_package_has_it(
    smollm2: loader.ModelFiles,
) -> None:
    _assert_first_of_each_type_equals_stock(smollm2.path)


@pytest.mark.slow
def test_the_real_qwen_dequantises_as_the_stock_package_has_it(
    qwen_coder: loader.ModelFiles,
) -> None:
    _assert_first_of_each_type_equals_stock(qwen_coder.path)
