"""What one forward pass works on: a flat batch of tokens, and where its KV lies.

Legend: T tokens of the step, S sampled tokens, P pages, C positions of a page, H KV heads,
D elements of a head, E elements of a latent.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from tokenspeed.kernels.rows import PagedRows

__all__ = ["ForwardBatch", "KVStorage"]


class KVStorage(Protocol):
    """Where K and V of a layer are kept; `tokenspeed.cache.KVPools` is one."""

    def layer(self, group: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_PCHD and v_PCHD of the layer, counted within its cache group."""
        ...

    def latents(self, group: int, layer: int) -> torch.Tensor:
        """latents_PCE of the layer, where its cache group keeps latents."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Tokens of a step on the model's device: decode rows and prefill chunks together.

    Attributes:
        token_ids_T: int64.
        positions_T: int64; the position of each token in its request.
        groups: one per cache group of the model, in the order of `Model.kv_specs()`.
        sample_token_indices_S: int64; the tokens of the batch whose logits are wanted. None for
            all, in their order.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    groups: tuple[PagedRows, ...]
    sample_token_indices_S: torch.Tensor | None
