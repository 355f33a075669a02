"""The header of a GGUF file: read right when whole, refused with a typed error when not."""

import mmap
import os
import random
import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.loader import tiny_gguf
from tokenspeed import loader
from tokenspeed.core.errors import CorruptCheckpoint, ModelError, UnsupportedModel
from tokenspeed.loader.gguf_file import GGUFFile


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return tiny_gguf.write(path, tiny_gguf.weights("llama", rng))


def _header_size_bytes(path: Path) -> int:
    return min(tensor.offset for tensor in GGUFFile.open(path).tensors.values())


def _files(path: Path) -> loader.ModelFiles:
    return loader.ModelFiles(name="t", kind="gguf", path=path, tokenizer_dir=path.parent)


def _read_all(path: Path) -> None:
    for _ in loader.open_checkpoint(_files(path)).tensors():
        pass


def test_our_reader_and_the_stock_one_see_the_same_file(smollm2: loader.ModelFiles) -> None:
    ours = GGUFFile.open(smollm2.path)
    stock = gguf.GGUFReader(smollm2.path)
    assert {
        name: field.contents()
        for name, field in stock.fields.items()
        if not name.startswith("GGUF.")
    } == ours.metadata
    assert [
        (tensor.name, tuple(reversed(tensor.shape.tolist())), tensor.data_offset, tensor.n_bytes)
        for tensor in stock.tensors
    ] == [(t.name, t.shape, t.offset, t.size_bytes) for t in ours.tensors.values()]


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    values = {
        "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 2**32 - 1,
        "int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5,
        "float64": 0.1, "bool": True, "string": "größe",
    }  # fmt: skip

    def add(writer: gguf.GGUFWriter) -> None:
        for kind, value in values.items():
            getattr(writer, f"add_{kind}")(f"test.{kind}", value)
        writer.add_array("test.numbers", [3, 1, 2])
        writer.add_array("test.flags", [True, False])

    path = tiny_gguf.write(tmp_path / "a.gguf", {}, change=add)
    metadata = GGUFFile.open(path).metadata
    assert {kind: metadata[f"test.{kind}"] for kind in values} == values
    assert metadata["test.numbers"] == [3, 1, 2]
    assert metadata["test.flags"] == [True, False]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"GGU", "does not begin with GGUF"),
        (b"PK\x03\x04" + bytes(64), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "little-endian"),
        (b"GGUF" + struct.pack("<IQ", 3, 0), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "tensors, but only"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "metadata entries, but only"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(99), "bytes of a string"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**60), "strings, but only"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 12, 2**60), "numbers, but only"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1), "array of the unknown"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"\xff", 4, 1), "not UTF-8"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=says):
        GGUFFile.open(path)


def test_strings_that_are_not_wanted_are_passed_over(whole: Path, tmp_path: Path) -> None:
    every = GGUFFile.open(whole)
    key = "tokenizer.ggml.tokens"
    some = GGUFFile.open(whole, without=(key,))
    assert every.metadata.keys() - some.metadata.keys() == {key}
    assert some.tensors == every.tensors
    path = tmp_path / "bad.gguf"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    entry = struct.pack("<Q1sII", 1, b"a", 9, 8)
    for strings in (
        struct.pack("<QQ1s", 2, 1, b"x"),
        struct.pack("<QQ1sQ", 2, 1, b"x", 2**63),
        struct.pack("<QQ1sI", 2, 1, b"x", 1),
    ):
        path.write_bytes(header + entry + strings)
        with pytest.raises(CorruptCheckpoint):
            GGUFFile.open(path, without=("a",))


def test_a_file_cut_within_its_tensors_is_truncated(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole.read_bytes()[:-64])
    with pytest.raises(CorruptCheckpoint, match="truncated: tensor"):
        GGUFFile.open(path)


def test_a_file_cut_after_its_header_was_read_is_not_mapped(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    content = whole.read_bytes()
    path.write_bytes(content)
    # Two pages, so that reading the mapping would end the test's process.
    assert len(content) > 2 * mmap.PAGESIZE
    checkpoint = loader.open_checkpoint(_files(path))
    os.truncate(path, mmap.PAGESIZE)
    says = rf"cut.gguf was cut short.*at byte [\d,]+, the file at {mmap.PAGESIZE:,};"
    with pytest.raises(CorruptCheckpoint, match=says):
        list(checkpoint.tensors())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_corrupt(whole: Path, data: st.DataObject) -> None:
    content = whole.read_bytes()
    end = data.draw(st.integers(0, len(content) - 1))
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(content[:end])
        file.flush()
        # The last tensor may be followed by padding, which is no loss.
        last = max(t.offset + t.size_bytes for t in GGUFFile.open(whole).tensors.values())
        if end < last:
            with pytest.raises(CorruptCheckpoint):
                _read_all(Path(file.name))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), flips=st.integers(1, 8))
def test_a_flipped_header_gives_typed_errors_or_a_model(whole: Path, seed: int, flips: int) -> None:
    content = bytearray(whole.read_bytes())
    header_size_bytes = _header_size_bytes(whole)
    rng = random.Random(seed)
    for _ in range(flips):
        content[rng.randrange(header_size_bytes)] = rng.randrange(256)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flipped.gguf"
        path.write_bytes(content)
        try:
            files = loader.resolve(str(path), cache_dir=Path(folder) / "cache")
            _read_all(files.path)
            loader.Tokenizer(files.tokenizer_dir)
        except (CorruptCheckpoint, UnsupportedModel):
            pass


@settings(max_examples=80, deadline=None)
@given(tail=st.binary(max_size=400))
def test_random_bytes_are_no_model(tail: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(b"GGUF\x03\x00\x00\x00" + tail)
        file.flush()
        with pytest.raises(ModelError):
            _read_all(Path(file.name))


def test_an_unsupported_type_names_tensor_type_and_choices(tmp_path: Path) -> None:
    blocks = np.zeros((2, 84), dtype=np.uint8)
    path = tiny_gguf.write(
        tmp_path / "q2.gguf",
        {},
        raw={"blk.0.ffn_up.weight": (blocks, gguf.GGMLQuantizationType.Q2_K)},
    )
    with pytest.raises(UnsupportedModel, match=r"'blk.0.ffn_up.weight'.*Q2_K.*F32, F16, Q4_0"):
        GGUFFile.open(path)


def test_one_piece_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf.write(
        tmp_path / "a.gguf", {}, change=lambda writer: writer.add_uint16("split.count", 3)
    )
    with pytest.raises(UnsupportedModel, match="one of 3 pieces"):
        GGUFFile.open(path)
