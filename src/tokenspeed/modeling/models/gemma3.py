"""Gemma 3 (Gemma Team 2025): most layers see a window, branches are normed before they are added,
gates are gelu, and norms multiply by one more than their weights.

Legend: T tokens, S sampled tokens, V vocabulary, M model features.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.modeling.batch import ForwardBatch, KVStorage
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.layers import (
    Angles,
    BranchNorm,
    Embedding,
    GatedMLP,
    LMHead,
    RMSNorm,
    RotaryEmbedding,
)
from tokenspeed.modeling.model import Model
from tokenspeed.modeling.models.llama import Llama, attention_of
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.placement import PerToken, Shard, boundary

__all__ = ["Gemma3", "Gemma3Block"]

_OFFSET = 1.0


@boundary(
    x_TM=PerToken("tp"),
    residual_TM=PerToken("tp"),
    outs=(PerToken("tp"), PerToken("tp")),
)
class Gemma3Block(Module):
    """Attention, then MLP, each between two norms and added to the residual stream."""

    def __init__(self, config: ModelConfig, kernels: KernelSelector, layer: int) -> None:
        hidden_size, epsilon = config.hidden_size, config.norm_epsilon
        self.attention = attention_of(
            config, kernels, layer, head_norm_epsilon=epsilon, head_norm_offset=_OFFSET
        )
        self.mlp = GatedMLP(
            hidden_size=hidden_size,
            intermediate_size=config.intermediate_size,
            bias=False,
            kernels=kernels,
            activation=ops.activation.gelu_tanh_and_mul,
        )
        self.attention_norm, self.mlp_norm = (
            RMSNorm(
                hidden_size, epsilon=epsilon, kernels=kernels, offset=_OFFSET, reads=reader.reads
            )
            for reader in (self.attention, self.mlp)
        )
        self.attention_branch_norm, self.mlp_branch_norm = (
            BranchNorm(hidden_size, epsilon=epsilon, kernels=kernels, offset=_OFFSET)
            for _ in range(2)
        )

    def forward(
        self,
        x_TM: torch.Tensor,
        residual_TM: torch.Tensor | None,
        angles: Angles,
        rows: PagedRows,
        kv: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block adds, and the stream it is to be added to."""
        normed_TM, residual_TM = self.attention_norm(x_TM, residual_TM)
        x_TM = self.attention_branch_norm(self.attention(normed_TM, angles, rows, kv))
        normed_TM, residual_TM = self.mlp_norm(x_TM, residual_TM)
        return self.mlp_branch_norm(self.mlp(normed_TM)), residual_TM


@boundary(out=Shard("tp", "vocabulary"))
class Gemma3(Model):
    """Embedding, blocks, norm, head."""

    weight_names: ClassVar[Mapping[str, str | Sequence[str]]] = {
        **{name: ours for name, ours in Llama.weight_names.items() if "layernorm" not in name},
        "model.layers.*.self_attn.q_norm.weight": "blocks.*.attention.q_norm.weight",
        "model.layers.*.self_attn.k_norm.weight": "blocks.*.attention.k_norm.weight",
        "model.layers.*.input_layernorm.weight": "blocks.*.attention_norm.weight",
        "model.layers.*.post_attention_layernorm.weight": "blocks.*.attention_branch_norm.weight",
        "model.layers.*.pre_feedforward_layernorm.weight": "blocks.*.mlp_norm.weight",
        "model.layers.*.post_feedforward_layernorm.weight": "blocks.*.mlp_branch_norm.weight",
    }

    def __init__(self, config: ModelConfig, kernels: KernelSelector) -> None:
        super().__init__(config, kernels)
        self.embedding = Embedding(
            config.vocab_size,
            config.hidden_size,
            kernels=kernels,
            scale=config.hidden_size**0.5,
        )
        self.rotary = RotaryEmbedding(config.rope, head_dim=config.head_dim, kernels=kernels)
        self.window_rotary = RotaryEmbedding(
            config.window_rope or config.rope, head_dim=config.head_dim, kernels=kernels
        )
        self.blocks = tuple(Gemma3Block(config, kernels, layer) for layer in range(config.layers))
        self.head = LMHead(
            config.vocab_size,
            config.hidden_size,
            kernels=kernels,
            tied=self.embedding if config.tie_embeddings else None,
        )
        self.norm = RMSNorm(
            config.hidden_size,
            epsilon=config.norm_epsilon,
            kernels=kernels,
            offset=_OFFSET,
            reads=self.head.reads,
        )
        self._take = kernels.select(ops.embedding.take)

    def forward(self, batch: ForwardBatch, kv: KVStorage) -> torch.Tensor:
        """logits_SV of the sampled tokens, float32."""
        angles = {
            False: self.rotary(batch.positions_T),
            True: self.window_rotary(batch.positions_T),
        }
        x_TM: torch.Tensor = self.embedding(batch.token_ids_T)
        residual_TM: torch.Tensor | None = None
        for block, (group, layer) in zip(self.blocks, self.kv_places, strict=True):
            windowed = block.attention.window is not None
            x_TM, residual_TM = block(
                x_TM, residual_TM, angles[windowed], batch.groups[group], kv.layer(group, layer)
            )
        assert residual_TM is not None
        sampled_S = batch.sample_token_indices_S
        if sampled_S is not None:
            x_TM, residual_TM = self._take(x_TM, sampled_S), self._take(residual_TM, sampled_S)
        normed_SM, _ = self.norm(x_TM, residual_TM)
        logits_SV: torch.Tensor = self.head(normed_SM)
        return logits_SV
