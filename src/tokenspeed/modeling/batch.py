"""What one forward pass works on: a flat batch of tokens, and where its KV lies.

Legend: T tokens of the step, S sampled tokens, P pages, C positions of a page, H KV heads,
D elements of a head, E elements of a latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tokenspeed.kernels.rows import PagedRows

__all__ = ["ForwardBatch", "GivenStates", "HiddenStates", "KVStorage"]


class KVStorage(Protocol):
    """Where K and V of a layer are kept; `tokenspeed.cache.KVPools` is one."""

    def layer(self, group: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_PCHD and v_PCHD of the layer, counted within its cache group."""
        ...

    def latents(self, group: int, layer: int) -> torch.Tensor:
        """latents_PCE of the layer, where its cache group keeps latents."""
        ...


class HiddenStates:
    """Residual streams that a forward keeps for whoever asked.

    Args:
        layers: the blocks in front of which they are kept, ascending; as many as there are blocks
            is behind the last. A head of drafts has one, 0: what it gives its next step.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self._found: dict[int, torch.Tensor] = {}

    def keep(self, layer: int, residual_TM: torch.Tensor) -> None:
        """Keep the stream of all tokens, float32; what came before is let go."""
        self._found[layer] = residual_TM

    def states(self, tokens: int) -> torch.Tensor:
        """Of the first so many tokens all that was kept, side by side; a copy, float32 [T, F]."""
        return torch.cat([self._found[layer][:tokens] for layer in self.layers], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenStates:
    """What a head of drafts reads beside tokens.

    Attributes:
        states_TF: float32; of each token the states of the one before it.
        own: whether they are what the head itself kept, and not the target.
    """

    states_TF: torch.Tensor
    own: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Tokens of a step on the model's device: decode rows and prefill chunks together.

    Attributes:
        token_ids_T: int64.
        positions_T: int64; the position of each token in its request.
        groups: one per cache group of the model, in the order of `Model.kv_specs()`.
        sample_token_indices_S: int64; the tokens of the batch whose logits are wanted. None for
            all, in their order.
        kept: takes hidden states, where somebody wants them.
        given: what a head of drafts reads beside tokens.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    groups: tuple[PagedRows, ...]
    sample_token_indices_S: torch.Tensor | None
    kept: HiddenStates | None = None
    given: GivenStates | None = None
