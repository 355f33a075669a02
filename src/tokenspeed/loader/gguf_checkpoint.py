"""Reads the weights of a GGUF file as those of the Hugging Face model it was made from."""

import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenspeed.core.errors import CorruptCheckpoint, UnsupportedModel
from tokenspeed.kernels import PACKED
from tokenspeed.loader.dequantise import Blocks, read_blocks
from tokenspeed.loader.gguf_file import MERGES, GGUFFile, GGUFTensor
from tokenspeed.loader.gguf_model import ROPE_FACTORS, hf_config, hf_name
from tokenspeed.loader.progress import Progress

__all__ = ["GGUFCheckpoint"]

# ggml's numbers for mixtures of types, for the ones whose types are handled.
_MIXTURES: Mapping[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
}


class GGUFCheckpoint:
    """A `Checkpoint` in a GGUF file.

    Args:
        path: the file.

    Raises:
        CorruptCheckpoint: damaged or truncated.
        UnsupportedModel: an architecture, a tensor or a type that is not handled.
    """

    def __init__(self, path: Path) -> None:
        gguf = GGUFFile.open(path, without=(MERGES,))
        self.hf_config: dict[str, Any] = hf_config(gguf)
        # A vocabulary takes tens of megabytes, for as long as weights are loaded.
        single = {key: value for key, value in gguf.metadata.items() if not isinstance(value, list)}
        self._gguf = replace(gguf, metadata=single)
        self.sampling_defaults: dict[str, float | int] = {}
        self._names = {
            name: _known_name(self._gguf, name)
            for name in self._gguf.tensors
            if name != ROPE_FACTORS
        }

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights in the file."""
        return sum(self._gguf.tensors[name].size_bytes for name in self._names)

    @property
    def tensor_count(self) -> int:
        """How many tensors `tensors` gives."""
        return len(self._names)

    @property
    def quantisation(self) -> str:
        """ggml's name of the file's mixture of types, or else its commonest type."""
        mixture = self._gguf.get("general.file_type", int, -1)
        if mixture in _MIXTURES:
            return _MIXTURES[mixture]
        elements: Counter[str] = Counter()
        for tensor in self._gguf.tensors.values():
            elements[tensor.quant.name] += tensor.elements
        return elements.most_common(1)[0][0]

    @property
    def packed_format(self) -> str | None:
        """`PACKED` where every matrix lies in blocks that `blocks` can give as they are."""
        tensors = [self._gguf.tensors[name] for name in self._names]
        whole = all(len(tensor.shape) == 1 or _is_block_matrix(tensor) for tensor in tensors)
        return PACKED if whole else None

    @property
    def plain_names(self) -> frozenset[str]:
        """None: what lies in blocks or as it is packs to much the same size."""
        return frozenset()

    def tensors(self, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor once as float32, by its Hugging Face name; see `Checkpoint`."""
        for name, value in self.blocks(progress):
            yield name, value if isinstance(value, Tensor) else value.to_float()

    def blocks(self, progress: Progress | None = None) -> Iterator[tuple[str, Tensor | Blocks]]:
        """Give matrices in blocks as they are, all else as float32; see `Checkpoint`.

        Raises:
            CorruptCheckpoint: the file is shorter than it was.
        """
        total, done = self.size_bytes, 0
        permuted = self.hf_config["model_type"] == "llama"
        shifted = self.hf_config["model_type"] == "gemma3_text"
        heads = {
            "q_proj": self.hf_config["num_attention_heads"],
            "k_proj": self.hf_config["num_key_value_heads"],
        }
        data = self._map()
        for name, known_name in self._names.items():
            tensor = self._gguf.tensors[name]
            read = read_blocks(data, tensor)
            value = read if _is_block_matrix(tensor) else read.to_float()
            module = known_name.split(".")[-2]
            if permuted and module in heads:
                value = _halves_apart(value, heads[module], known_name)
            if shifted and known_name.endswith("norm.weight"):
                # ggml keeps what a norm multiplies by, Hugging Face one less.
                assert isinstance(value, Tensor)
                value = value - 1.0
            done += tensor.size_bytes
            if progress is not None:
                progress.update("Loading weights", done, total, "bytes")
            yield known_name, value

    def _map(self) -> mmap.mmap:
        """The file in memory, as long as it was when its header was read.

        To read a mapped page that the file no longer has ends the process (SIGBUS), so a file that
        was cut since then must not be mapped. One that is cut from here on still does that.
        """
        path = self._gguf.path
        wanted = max(tensor.offset + tensor.size_bytes for tensor in self._gguf.tensors.values())
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found < wanted:
                raise CorruptCheckpoint(
                    f"{path} was cut short since its header was read: its tensors end at byte "
                    f"{wanted:,}, the file at {found:,}; restore the file and start again"
                )
            data = mmap.mmap(file.fileno(), found, access=mmap.ACCESS_COPY)
        # What no cache of the system has yet is read ahead of those who use it.
        data.madvise(mmap.MADV_WILLNEED)
        return data


def _is_block_matrix(tensor: GGUFTensor) -> bool:
    return len(tensor.shape) == 2 and tensor.quant.block > 1


def _known_name(gguf: GGUFFile, name: str) -> str:
    known_name = hf_name(name, gguf.get("general.architecture", str, ""))
    if known_name is None:
        raise UnsupportedModel(
            f"{gguf.path} has the tensor {name!r}, which no model of its architecture here uses"
        )
    return known_name


def _halves_apart(value: Tensor | Blocks, heads: int, name: str) -> Tensor | Blocks:
    """Undo the order of rows that ggml's `llama` gives to Q and K.

    Rotary embedding turns pairs of a head's rows. ggml keeps the two of a pair side by side,
    Hugging Face half a head apart. A row's blocks move with it.
    """
    rows = value.shape[0]
    if rows % (2 * heads):
        raise CorruptCheckpoint(f"{name} has {rows} rows, which {heads} heads cannot share")
    if isinstance(value, Blocks):
        return replace(value, blocks=_pairs_apart(value.blocks, heads))
    return _pairs_apart(value, heads)


def _pairs_apart(rows: Tensor, heads: int) -> Tensor:
    pairs = rows.view(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
