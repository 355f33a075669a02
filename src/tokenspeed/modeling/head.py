"""Heads that propose drafts out of the hidden states of a target.

Legend: T tokens, S sampled tokens, V vocabulary, F features that are read of a token.
"""

from abc import abstractmethod

import torch

from tokenspeed.core.errors import UnsupportedModel
from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling.batch import ForwardBatch, KVStorage
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.model import Model
from tokenspeed.modeling.models.llama import Llama
from tokenspeed.modeling.models.registry import head_class

__all__ = ["Head", "build_head"]


class Target:
    """What a head reads of its target's own weights. It holds no module as one of its own, so that
    the target's weights are nobody else's to load and to count."""

    def __init__(self, model: Llama) -> None:
        self.model = model


class Head(Model):
    """A network beside a target, of one layer.

    At position p it reads the target's states of position p and the token of position p + 1, and
    its logits are of the token of position p + 2. Behind what the target knows it reads its own
    states instead.

    Args:
        config: its own, or its target's where the target's checkpoint carries it.
        kernels: chooses the ops.
        target: whose embedding, and perhaps head, it shares.

    Attributes:
        state_layers: of the target, as `HiddenStates` has them.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSelector, target: Llama) -> None:
        super().__init__(config, kernels)
        self.target = Target(target)
        self.state_layers: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, batch: ForwardBatch, kv: KVStorage) -> torch.Tensor:
        """logits_SV in float32 of the tokens that it knows; keeps its states of the sampled tokens,
        float32 [S, M], as layer 0."""

    def tokens(self, chosen_S: torch.Tensor) -> torch.Tensor:
        """The target's ids of tokens that it knows, int64."""
        return chosen_S


def build_head(
    config: ModelConfig, *, device: torch.device, kernels: KernelSelector, target: Model
) -> Head:
    """A head with its kernels chosen and its weights yet to load.

    Args:
        config: of the head's own checkpoint; or the target's, of which the next-token layer is
            wanted.
        device: where the target is.
        kernels: chooses kernels for the head's own weights.
        target: whose states it is to read.

    Raises:
        UnsupportedModel: the target does not keep states, or does not fit the head.
    """
    if not isinstance(target, Llama):
        raise UnsupportedModel(
            f"{target.config.architecture} keeps no states for heads of drafts; choose a draft "
            "model, or --speculate suffix"
        )
    found = head_class(config.architecture)
    if found is None:
        # Only now, because it is built of blocks of the target.
        from tokenspeed.modeling.models.next_token import NextToken  # noqa: PLC0415

        found = NextToken
    with device:
        return found(config, kernels, target)
