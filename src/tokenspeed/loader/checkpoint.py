"""Reads a model's configuration and weights, whatever format they are in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tokenspeed.kernels import Stored
from tokenspeed.loader.files import ModelFiles
from tokenspeed.loader.gguf_checkpoint import GGUFCheckpoint
from tokenspeed.loader.progress import Progress
from tokenspeed.loader.safetensors_checkpoint import SafetensorsCheckpoint

__all__ = ["Checkpoint", "open_checkpoint"]


class Checkpoint(Protocol):
    """A model's configuration and weights on disk."""

    @property
    def hf_config(self) -> dict[str, Any]:
        """The content of `config.json`."""

    @property
    def sampling_defaults(self) -> dict[str, float | int]:
        """The model's recommended `SamplingParams`, by field; empty if it has none."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights on disk."""

    @property
    def tensor_count(self) -> int:
        """How many tensors `tensors` gives."""

    @property
    def quantisation(self) -> str:
        """How most weights are stored: "Q4_K_M", "BF16", ..."""

    @property
    def packed_format(self) -> str | None:
        """The format in which `blocks` can give matrices as they are: one of `kernels.QUANTISED`,
        of those that were quantised, or `kernels.PACKED`, of all; None for neither."""

    @property
    def plain_names(self) -> frozenset[str]:
        """Names of what is not quantised in a checkpoint of which some is; else none."""

    def tensors(self, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
        """Give every tensor once, by its Hugging Face name.

        One tensor is held at a time. Those of GGUF files and quantised ones of safetensors are
        float32; others have the type they are stored in.

        Args:
            progress: told of the bytes read.

        Raises:
            CorruptCheckpoint: a file ended early, or a tensor is missing.
        """

    def blocks(self, progress: Progress | None = None) -> Iterator[tuple[str, Stored]]:
        """As `tensors`, but nothing is read before it is indexed, and matrices that lie in blocks
        are given as they are.

        Raises:
            CorruptCheckpoint: a file ended early, or a tensor is missing.
        """


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """Open a resolved model, checking all that can be checked without reading the weights.

    Raises:
        CorruptCheckpoint: damaged, truncated or incomplete.
        UnsupportedModel: an architecture, quantisation or element type that is not handled.
    """
    path: Path = files.path
    return GGUFCheckpoint(path) if files.kind == "gguf" else SafetensorsCheckpoint(path)
