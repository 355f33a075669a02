"""Reads the weights of a Hugging Face directory: one safetensors file, or several with an index."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.kernels import Stored
from tokenspeed.loader.files import read_json_object
from tokenspeed.loader.progress import Progress
from tokenspeed.loader.schemes import read_scheme

__all__ = ["SafetensorsCheckpoint"]

_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
# Which tokens a head of drafts knows.
_TOKEN_TABLES = {"d2t": {"I64": 8}, "t2d": {"BOOL": 1}}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class SafetensorsCheckpoint:
    """A `Checkpoint` in a Hugging Face directory.

    Args:
        path: the directory.

    Raises:
        CorruptCheckpoint: a file is missing, damaged or truncated, or the index names a tensor
            that its file lacks.
        UnsupportedModel: quantised in a way that is not read, pickled, or elements of a type that
            is not handled.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.hf_config: dict[str, Any] = read_json_object(path / "config.json")
        self._scheme = read_scheme(self.hf_config)
        self.sampling_defaults: dict[str, float | int] = _sampling_defaults(path)
        self._shards = self._inspect(self._files())
        self._file_of = {name: file for file, shard in self._shards.items() for name in shard}
        # Of each tensor, the names of its parts: one, where it is not quantised.
        self._parts = {name: {"": name} for name in self._file_of}
        if self._scheme is not None:
            self._parts = self._scheme.matrices(self._file_of)
            self._require_plain()

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights on disk."""
        return sum(size for shard in self._shards.values() for _, size in shard.values())

    @property
    def tensor_count(self) -> int:
        """How many tensors `tensors` gives."""
        return len(self._parts)

    @property
    def quantisation(self) -> str:
        """The format of quantised matrices, or the commonest element type."""
        if self._scheme is not None:
            return self._scheme.name
        sizes: Counter[str] = Counter()
        for shard in self._shards.values():
            for dtype, size_bytes in shard.values():
                sizes[dtype] += size_bytes
        return sizes.most_common(1)[0][0]

    @property
    def packed_format(self) -> str | None:
        """That of the quantised matrices, where kernels have a name for it."""
        return self._scheme.format_name if self._scheme is not None else None

    @property
    def plain_names(self) -> frozenset[str]:
        """What is not quantised beside what is."""
        if self._scheme is None:
            return frozenset()
        return frozenset(name for name, parts in self._parts.items() if "" in parts)

    def tensors(self, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor once, in the type it is stored in, or float32; see `Checkpoint`."""
        for name, stored in self.blocks(progress):
            tensor = stored[()]
            assert isinstance(tensor, Tensor)
            yield name, tensor

    def blocks(self, progress: Progress | None = None) -> Iterator[tuple[str, Stored]]:
        """Every tensor once, to be read where it is indexed; nothing lies in blocks."""
        total, done = self.size_bytes, 0
        order = {file: place for place, file in enumerate(self._shards)}
        opened: dict[str, Any] = {}
        with ExitStack() as stack:

            def raw(name: str) -> _StoredTensor:
                file = self._file_of[name]
                if file not in opened:
                    opened[file] = stack.enter_context(_opened(self._path / file))
                return _StoredTensor(opened[file].get_slice(name))

            # What belongs together may lie in several files, but hardly ever does.
            for name, parts in sorted(
                self._parts.items(),
                key=lambda item: order[self._file_of[next(iter(item[1].values()))]],
            ):
                done += sum(self._shards[self._file_of[part]][part][1] for part in parts.values())
                if progress is not None:
                    progress.update("Loading weights", done, total, "bytes")
                if "" in parts:
                    yield name, raw(parts[""])
                else:
                    assert self._scheme is not None
                    yield (
                        name,
                        self._scheme.make(name, {end: raw(part) for end, part in parts.items()}),
                    )

    def _require_plain(self) -> None:
        """What is no part of a quantised matrix must be a number as it stands."""
        for name, parts in self._parts.items():
            dtype, _ = self._shards[self._file_of[name]][name] if "" in parts else ("F32", 4)
            if dtype not in {**_DTYPES, **_TOKEN_TABLES.get(name, {})}:
                raise CorruptCheckpoint(
                    f"tensor {name!r} of {self._path} has the type {dtype}, but nothing beside it "
                    "says what its numbers stand for"
                )

    def _files(self) -> dict[str, set[str] | None]:
        """Files of weights, and which tensors the index expects in each."""
        if (self._path / _INDEX).exists():
            weight_map = read_json_object(self._path / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CorruptCheckpoint(f"{self._path / _INDEX} has no weight_map")
            files: dict[str, set[str] | None] = {}
            for tensor, file in sorted(weight_map.items(), key=str):
                # An index that points out of its folder is not one that a model came with.
                if not isinstance(file, str) or Path(file).name != file:
                    raise CorruptCheckpoint(f"{self._path / _INDEX} names the file {file!r}")
                expected = files.setdefault(file, set())
                assert expected is not None
                expected.add(tensor)
            return files
        if (self._path / _SINGLE).exists():
            return {_SINGLE: None}
        kinds = (".bin", ".pt", ".pth")
        pickled = [file.name for file in self._path.iterdir() if file.suffix in kinds]
        if pickled:
            raise UnsupportedModel(
                f"{self._path} holds pickled weights ({', '.join(sorted(pickled)[:3])}), which can "
                "run code when they are read; convert them to safetensors"
            )
        raise CorruptCheckpoint(f"{self._path} has neither {_SINGLE} nor {_INDEX}")

    def _inspect(self, files: dict[str, set[str] | None]) -> dict[str, dict[str, tuple[str, int]]]:
        """Element type and bytes of each tensor, by file."""
        missing = [file for file in files if not (self._path / file).is_file()]
        if missing:
            raise CorruptCheckpoint(
                f"{self._path} lacks {len(missing)} of its {len(files)} files of weights: "
                f"{', '.join(missing[:5])}"
            )
        shards = {}
        for file, expected in files.items():
            with _opened(self._path / file) as weights:
                found = set(weights.keys())
                if expected is not None and expected - found:
                    raise CorruptCheckpoint(
                        f"{self._path / file} lacks {len(expected - found)} tensors that the "
                        f"index places there, such as {min(expected - found)}"
                    )
                names = sorted(found if expected is None else expected)
                shards[file] = {name: self._tensor(weights, file, name) for name in names}
        return shards

    def _tensor(self, weights: Any, file: str, name: str) -> tuple[str, int]:
        part = weights.get_slice(name)
        dtype = part.get_dtype()
        supported = {
            **_DTYPES,
            **(self._scheme.dtypes if self._scheme else {}),
            **_TOKEN_TABLES.get(name, {}),
        }
        if dtype not in supported:
            raise UnsupportedModel(
                f"tensor {name!r} of {self._path / file} has the type {dtype}; the supported types "
                f"are {', '.join(supported)}"
            )
        size_bytes: int = supported[dtype]
        for dim in part.get_shape():
            size_bytes *= dim
        return dtype, size_bytes


class _StoredTensor:
    """A tensor in an open file, read where it is indexed."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self.shape: tuple[int, ...] = tuple(part.get_shape())

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        found: Tensor = self._part[index or (slice(None),) * len(self.shape)]
        return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(f"{path} is damaged or truncated: {error}") from error


def _sampling_defaults(path: Path) -> dict[str, float | int]:
    if not (path / "generation_config.json").exists():
        return {}
    config = read_json_object(path / "generation_config.json")
    # Without do_sample the model's makers decode greedily, whatever else is written there.
    if config.get("do_sample") is not True:
        return {}
    return {
        name: value
        for name in _SAMPLING
        if isinstance(value := config.get(name), int | float)
        and type(value) is not bool
        # A top_k of 0 means all tokens there, as its absence does here.
        and not (name == "top_k" and value == 0)
    }
