"""What every model offers, and how one is built.

Legend: S sampled tokens, V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch

from tokenspeed.core.config import KVSpec
from tokenspeed.core.errors import ConfigError
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling.batch import ForwardBatch, KVStorage
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.models.registry import model_class
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.weights import fill_weights

__all__ = ["Model", "build_model"]


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
        """Bytes of all weights once loaded."""
        distinct = {id(weight): weight for _, weight in self.weights()}
        return sum(weight.data.nbytes for weight in distinct.values())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fill the weights from (Hugging Face name, tensor) pairs of any order and float type.

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
