"""From tokens to features, and from features to logits.

Legend: T tokens, S sampled tokens, V vocabulary, M model features.
"""

import torch

from tokenspeed.kernels import Activations, KernelSelector, ops
from tokenspeed.modeling.module import Module, Weight
from tokenspeed.modeling.placement import Partial, Replicate, Shard, boundary

__all__ = ["Embedding", "LMHead"]


def _table(vocab_size: int, features: int, kernels: KernelSelector) -> Weight:
    # A tied table is read by both ops, so its format must suit both.
    return Weight(
        (vocab_size, features),
        dims=("vocabulary", "features"),
        kernels=kernels,
        format_name=kernels.weight_format(ops.embedding.lookup, ops.gemm.logits),
    )


@boundary(token_ids_T=Replicate("tp"), out=Partial("tp"))
class Embedding(Module):
    """The table's row of each token. A rank gives zeros for tokens of other ranks.

    Args:
        vocab_size: V.
        features: M.
        kernels: chooses the lookup.
        scale: what rows are multiplied by.
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        kernels: KernelSelector,
        scale: float = 1.0,
    ) -> None:
        self._scale = scale
        self.table = _table(vocab_size, features, kernels)
        self._lookup = kernels.select(ops.embedding.lookup, format_name=self.table.format_name)

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """x_TM."""
        return self._lookup(token_ids_T, self.table.data, self._scale, self.table.local_first)


@boundary(x_SM=Replicate("tp"), out=Shard("tp", "vocabulary"))
class LMHead(Module):
    """Logits over the vocabulary.

    Args:
        vocab_size: V.
        features: M.
        kernels: chooses the product.
        tied: the embedding whose table it reads; None for a table of its own.
    """

    def __init__(
        self, vocab_size: int, features: int, *, kernels: KernelSelector, tied: Embedding | None
    ) -> None:
        self.table = _table(vocab_size, features, kernels) if tied is None else tied.table
        self._logits = kernels.select(ops.gemm.logits, format_name=self.table.format_name)
        self.reads = kernels.reads(ops.gemm.logits, format_name=self.table.format_name)

    def forward(self, x_SM: Activations) -> torch.Tensor:
        """logits_SV, float32."""
        return self._logits(x_SM, self.table.data)
