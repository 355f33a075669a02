"""What every model offers, and how one is built.

Legend: S sampled tokens, V vocabulary.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch

from tokenspeed.core.config import KVSpec
from tokenspeed.core.errors import ConfigError
from tokenspeed.kernels import PACKED, PANELS, BlockMatrix, KernelSelector
from tokenspeed.modeling.batch import ForwardBatch, KVStorage
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.models.registry import model_class
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.weights import fill_weights

__all__ = ["Model", "build_model"]

# No type of a checkpoint's weights grows by more when it is packed.
PACKING_GROWTH_MAX = 1.06


class Model(Module):
    """A language model of one architecture.

    Attributes:
        weight_names: Hugging Face's tensor names to ours. `*` stands for a number, the same on
            both sides; `name:part` is a part of a stacked weight.
        ignored_names: tensors some checkpoints carry that the equations do not use.
        config: its sizes.
    """

    weight_names: ClassVar[Mapping[str, str]]
    ignored_names: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: ModelConfig, kernels: KernelSelector) -> None:
        self.config = config
        self.kernels = kernels

    @abstractmethod
    def forward(self, batch: ForwardBatch, kv: KVStorage) -> torch.Tensor:
        """One pass over a mixed batch: writes its KV, gives logits_SV in float32."""

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """The KV each cache group keeps of a token; full attention is one group."""
        return (
            KVSpec(
                layers=self.config.layers,
                kv_heads=self.config.kv_heads,
                head_dim=self.config.head_dim,
                dtype=str(self.kernels.dtype).removeprefix("torch."),
            ),
        )

    @property
    def weights_size_bytes(self) -> int:
        """Bytes of all weights; packed ones count once they are loaded."""
        distinct = {id(weight): weight for _, weight in self.weights()}
        return sum(weight.data.nbytes for weight in distinct.values())

    def planned_size_bytes(self, checkpoint_size_bytes: int) -> int:
        """Bytes that the weights will take, before any is loaded.

        Args:
            checkpoint_size_bytes: what they take where they come from.
        """
        distinct = {id(weight): weight for _, weight in self.weights()}.values()
        packed = any(weight.format_name == PACKED for weight in distinct)
        panels_size_bytes = sum(
            math.prod(weight.shape) * self.kernels.dtype.itemsize
            for weight in distinct
            if weight.format_name in PANELS
        )
        return self.weights_size_bytes + int(
            PACKING_GROWTH_MAX * (packed * checkpoint_size_bytes + panels_size_bytes)
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor | BlockMatrix]]) -> None:
        """Fill the weights from (Hugging Face name, tensor) pairs of any order and type.

        Each tensor is copied and let go before the next is asked for.

        Raises:
            CorruptCheckpoint: tensors are missing, unexpected or misshapen; names them.
        """
        fill_weights(
            dict(self.weights()), weights, names=self.weight_names, ignored=self.ignored_names
        )


def build_model(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device, kernels: KernelSelector
) -> Model:
    """A model with its kernels chosen and its weights yet to load.

    Args:
        config: what to build.
        dtype: element type of weights, activations and KV.
        device: where the weights lie; "meta" for a model that has shapes and sizes only.
        kernels: chooses kernels for this dtype.

    Raises:
        UnsupportedModel: no class computes the architecture.
        KernelError: an op has no kernel that can run here.
        ConfigError: the selector is for another dtype.
    """
    if kernels.dtype != dtype:
        raise ConfigError(f"kernels were selected for {kernels.dtype}, but the model is {dtype}")
    with device:
        return model_class(config.architecture)(config, kernels)
