"""Reads the header of a GGUF file: metadata, and where each tensor lies.

The layout is that of ggml's GGUF specification, versions 2 and 3, little-endian. Every count and
length in the file is held against the bytes that are left before anything is made of it, so a
damaged header costs no more than its file's size.
"""

import mmap
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel

__all__ = ["MERGES", "QUANT_TYPES", "GGUFFile", "GGUFTensor", "GGUFValue", "QuantType"]

GGUFValue = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantType:
    """How a tensor's elements are stored.

    Attributes:
        name: ggml's name.
        block: elements of a block; rows are whole blocks.
        block_size_bytes: bytes of a block.
    """

    name: str
    block: int
    block_size_bytes: int


def _quant(name: str, block: int, block_size_bytes: int) -> QuantType:
    return QuantType(name=name, block=block, block_size_bytes=block_size_bytes)


# ggml's type numbers, for the types that `dequantise` can read.
QUANT_TYPES: Mapping[int, QuantType] = {
    0: _quant("F32", 1, 4),
    1: _quant("F16", 1, 2),
    2: _quant("Q4_0", 32, 18),
    3: _quant("Q4_1", 32, 20),
    6: _quant("Q5_0", 32, 22),
    7: _quant("Q5_1", 32, 24),
    8: _quant("Q8_0", 32, 34),
    12: _quant("Q4_K", 256, 144),
    13: _quant("Q5_K", 256, 176),
    14: _quant("Q6_K", 256, 210),
    30: _quant("BF16", 1, 2),
}
# Only to name what cannot be read.
_OTHER_TYPES: Mapping[int, str] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}

MERGES = "tokenizer.ggml.merges"
"""The key of a byte-pair vocabulary's merges, of which there are as many as tokens."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DIMS_MAX = 4
_ALIGNMENT_MAX = 1 << 20
_ARRAY, _STRING, _BOOL = 9, 8, 7
_SCALARS: Mapping[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
# The fewest bytes a key with its value, and a tensor's entry, can take.
_KEY_VALUE_SIZE_BYTES_MIN = 8 + 4 + 1
_TENSOR_SIZE_BYTES_MIN = 8 + 4 + 4 + 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: ggml's name of it.
        shape: elements by dimension, outermost first, as PyTorch has it.
        quant: how its elements are stored.
        offset: byte of the file where its data begins.
    """

    name: str
    shape: tuple[int, ...]
    quant: QuantType
    offset: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count

    @property
    def size_bytes(self) -> int:
        """Bytes of its data in the file."""
        return self.elements // self.quant.block * self.quant.block_size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFile:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        metadata: by key.
        tensors: by ggml's name, in the file's order.
    """

    path: Path
    metadata: Mapping[str, GGUFValue]
    tensors: Mapping[str, GGUFTensor]

    @classmethod
    def open(cls, path: Path, *, without: Collection[str] = ()) -> "GGUFFile":
        """Read a file's header and check that all it speaks of lies within the file.

        Args:
            path: the file.
            without: keys of arrays of strings that are passed over.

        Raises:
            CorruptCheckpoint: not a GGUF file, or a damaged or truncated one.
            UnsupportedModel: a tensor of a type that cannot be read, or one of several files.
        """
        with path.open("rb") as file:
            try:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise CorruptCheckpoint(f"{path} is empty") from error
            with data:
                return _Reader(path, data, without).read()

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The metadata under a key, or the default where there is none.

        Raises:
            CorruptCheckpoint: it is there, but of another type.
        """
        return self._typed(self.metadata.get(key, default), key, kind)

    def require(self, key: str, kind: type[T]) -> T:
        """The metadata under a key.

        Raises:
            CorruptCheckpoint: it is missing, or of another type.
        """
        if key not in self.metadata:
            raise CorruptCheckpoint(f"{self.path} has no metadata {key}")
        return self._typed(self.metadata[key], key, kind)

    def _typed(self, value: object, key: str, kind: type[T]) -> T:
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CorruptCheckpoint(
                f"{key} in {self.path} should be {kind.__name__}, but is {type(value).__name__}"
            )
        return value


class _Reader:
    """A cursor over a file's bytes that never leaves them."""

    def __init__(self, path: Path, data: mmap.mmap, without: Collection[str]) -> None:
        self._path = path
        self._without = without
        self._data = data
        self._size_bytes = len(data)
        self._at = 0

    def read(self) -> GGUFFile:
        if self._size_bytes < len(_MAGIC) or self._data[: len(_MAGIC)] != _MAGIC:
            raise CorruptCheckpoint(f"{self._path} is not a GGUF file: it does not begin with GGUF")
        self._at = len(_MAGIC)
        version = self._scalar(_U32)
        if version not in _VERSIONS:
            raise CorruptCheckpoint(
                f"{self._path} says it is GGUF version {version}; versions 2 and 3 in "
                "little-endian order can be read"
            )
        tensor_count = self._scalar(_U64)
        key_count = self._scalar(_U64)
        self._fits(tensor_count, _TENSOR_SIZE_BYTES_MIN, "tensors")
        self._fits(key_count, _KEY_VALUE_SIZE_BYTES_MIN, "metadata entries")
        metadata: dict[str, GGUFValue] = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                raise self._corrupt(f"the metadata {key!r} twice")
            value = self._value(self._scalar(_U32), kept=key not in self._without)
            if value is not None:
                metadata[key] = value
        _check_whole(self._path, metadata)
        entries = [self._tensor() for _ in range(tensor_count)]
        tensors = self._placed(entries, metadata.get("general.alignment", 32))
        return GGUFFile(path=self._path, metadata=metadata, tensors=tensors)

    def _value(self, kind: int, *, kept: bool) -> GGUFValue | None:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(kept=kept)
        if kind not in _SCALARS:
            raise self._corrupt(f"metadata of the unknown type {kind}")
        value: int | float = self._scalar(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def _array(self, *, kept: bool) -> GGUFValue | None:
        kind = self._scalar(_U32)
        count = self._scalar(_U64)
        if kind == _STRING:
            self._fits(count, 8, "strings")
            if not kept:
                self._pass_strings(count)
                return None
            return self._strings(count)
        if kind not in _SCALARS:
            raise self._corrupt(f"an array of the unknown type {kind}")
        scalar = _SCALARS[kind]
        self._fits(count, scalar.size, "numbers")
        values = struct.unpack_from(f"<{count}{scalar.format[1:]}", self._data, self._at)
        self._at += count * scalar.size
        return [bool(value) for value in values] if kind == _BOOL else list(values)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dims_count = self._scalar(_U32)
        if not 1 <= dims_count <= _DIMS_MAX:
            raise self._corrupt(f"tensor {name!r} with {dims_count} dimensions")
        dims = tuple(self._scalar(_U64) for _ in range(dims_count))
        return name, dims[::-1], self._scalar(_U32), self._scalar(_U64)

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: GGUFValue
    ) -> dict[str, GGUFTensor]:
        if (
            type(alignment) is not int
            or not 1 <= alignment <= _ALIGNMENT_MAX
            or alignment & (alignment - 1)
        ):
            raise self._corrupt(f"the alignment {alignment!r}, which is no power of two")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in entries:
            if kind not in QUANT_TYPES:
                supported = ", ".join(quant.name for quant in QUANT_TYPES.values())
                raise UnsupportedModel(
                    f"tensor {name!r} of {self._path} has the type "
                    f"{_OTHER_TYPES.get(kind, kind)}; the supported types are {supported}"
                )
            tensor = GGUFTensor(
                name=name, shape=shape, quant=QUANT_TYPES[kind], offset=start + offset
            )
            if name in tensors:
                raise self._corrupt(f"the tensor {name!r} twice")
            if 0 in shape or shape[-1] % tensor.quant.block:
                raise self._corrupt(f"tensor {name!r} of shape {shape} in {tensor.quant.name}")
            if tensor.offset + tensor.size_bytes > self._size_bytes:
                raise CorruptCheckpoint(
                    f"{self._path} is truncated: tensor {name!r} ends at byte "
                    f"{tensor.offset + tensor.size_bytes:,}, the file at {self._size_bytes:,}"
                )
            tensors[name] = tensor
        return tensors

    def _string(self) -> str:
        count = self._scalar(_U64)
        self._fits(count, 1, "bytes of a string")
        raw = self._data[self._at : self._at + count]
        self._at += count
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._corrupt("a string that is not UTF-8") from error

    def _strings(self, count: int) -> list[str]:
        # A vocabulary is hundreds of thousands of them, and they are read at every start.
        strings = []
        data, at, size_bytes = self._data, self._at, self._size_bytes
        length_at, header_size_bytes = _U64.unpack_from, _U64.size
        for _ in range(count):
            begin = at + header_size_bytes
            if begin > size_bytes or (end := begin + length_at(data, at)[0]) > size_bytes:
                break
            try:
                strings.append(data[begin:end].decode())
            except UnicodeDecodeError:
                break
            at = end
        self._at = at
        # What is wrong with the next one is said where single strings are read.
        strings.extend(self._string() for _ in range(count - len(strings)))
        return strings

    def _pass_strings(self, count: int) -> None:
        data, at, size_bytes = self._data, self._at, self._size_bytes
        length_at, header_size_bytes = _U64.unpack_from, _U64.size
        for _ in range(count):
            if at + header_size_bytes > size_bytes:
                break
            at += header_size_bytes + length_at(data, at)[0]
        else:
            if at <= size_bytes:
                self._at = at
                return
        raise self._corrupt(f"{count:,} strings that go beyond its {size_bytes:,} bytes")

    def _scalar(self, kind: struct.Struct) -> int:
        if self._at + kind.size > self._size_bytes:
            raise CorruptCheckpoint(
                f"{self._path} is truncated: its header goes beyond its {self._size_bytes:,} bytes"
            )
        (value,) = kind.unpack_from(self._data, self._at)
        self._at += kind.size
        return value  # type: ignore[no-any-return]

    def _fits(self, count: int, each_size_bytes: int, what: str) -> None:
        left = self._size_bytes - self._at
        if count * each_size_bytes > left:
            raise self._corrupt(f"{count:,} {what}, but only {left:,} more bytes")

    def _corrupt(self, has: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self._path} is damaged: near byte {self._at:,} it has {has}")


def _check_whole(path: Path, metadata: Mapping[str, GGUFValue]) -> None:
    pieces = metadata.get("split.count", 0)
    if isinstance(pieces, int) and pieces > 1:
        raise UnsupportedModel(
            f"{path} is one of {pieces} pieces of a model; merge them into one file first"
        )
