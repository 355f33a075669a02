"""Llama (Touvron et al. 2023; Llama 3, 2024), and what is built like it.

Legend: T tokens, S sampled tokens, V vocabulary, M model features.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from tokenspeed.kernels import KernelSelector, ops
from tokenspeed.kernels.rows import PagedRows
from tokenspeed.modeling.batch import ForwardBatch, KVStorage
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.layers import (
    Angles,
    Attention,
    AttentionLayer,
    Embedding,
    GatedMLP,
    LMHead,
    RMSNorm,
    RotaryEmbedding,
)
from tokenspeed.modeling.model import Model
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.placement import Partial, PerToken, Shard, boundary

__all__ = ["Llama", "LlamaBlock", "attention_of"]


def attention_of(
    config: ModelConfig, kernels: KernelSelector, layer: int, **differences: Any
) -> Attention:
    """A block's attention as the config has it.

    Args:
        config: of the model.
        kernels: chooses the ops.
        layer: of the block, 0 the first.
        differences: arguments of `Attention` that a family has otherwise.
    """
    arguments: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "scale": config.attention_scale,
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "window": config.window if layer in config.windowed_layers else None,
    }
    return Attention(**arguments | differences, kernels=kernels)


@boundary(
    x_TM=Partial("tp"),
    residual_TM=PerToken("tp"),
    outs=(Partial("tp"), PerToken("tp")),
)
class LlamaBlock(Module):
    """Attention, then MLP, each behind a norm and added to the residual stream.

    Args:
        config: gives the norms their sizes.
        kernels: chooses the ops.
        attention: from tokens normed to what is added for them.
        mlp: likewise.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: KernelSelector,
        *,
        attention: AttentionLayer,
        mlp: Module,
    ) -> None:
        self.attention_norm, self.mlp_norm = (
            RMSNorm(
                config.hidden_size, epsilon=config.norm_epsilon, kernels=kernels, reads=reader.reads
            )
            for reader in (attention, mlp)
        )
        self.attention = attention
        self.mlp = mlp

    def forward(
        self,
        x_TM: torch.Tensor,
        residual_TM: torch.Tensor | None,
        angles: Angles,
        rows: PagedRows,
        kv: tuple[torch.Tensor, torch.Tensor] | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block adds, and the stream it is to be added to."""
        normed_TM, residual_TM = self.attention_norm(x_TM, residual_TM)
        x_TM = self.attention(normed_TM, angles, rows, kv)
        normed_TM, residual_TM = self.mlp_norm(x_TM, residual_TM)
        return self.mlp(normed_TM), residual_TM


@boundary(out=Shard("tp", "vocabulary"))
class Llama(Model):
    """Embedding, blocks, norm, head."""

    weight_names: ClassVar[Mapping[str, str | Sequence[str]]] = {
        "model.embed_tokens.weight": "embedding.table",
        "model.layers.*.input_layernorm.weight": "blocks.*.attention_norm.weight",
        "model.layers.*.self_attn.q_proj.weight": "blocks.*.attention.qkv.weight:q",
        "model.layers.*.self_attn.k_proj.weight": "blocks.*.attention.qkv.weight:k",
        "model.layers.*.self_attn.v_proj.weight": "blocks.*.attention.qkv.weight:v",
        "model.layers.*.self_attn.o_proj.weight": "blocks.*.attention.output.weight",
        "model.layers.*.self_attn.q_proj.bias": "blocks.*.attention.qkv.bias:q",
        "model.layers.*.self_attn.k_proj.bias": "blocks.*.attention.qkv.bias:k",
        "model.layers.*.self_attn.v_proj.bias": "blocks.*.attention.qkv.bias:v",
        "model.layers.*.self_attn.o_proj.bias": "blocks.*.attention.output.bias",
        "model.layers.*.post_attention_layernorm.weight": "blocks.*.mlp_norm.weight",
        "model.layers.*.mlp.gate_proj.weight": "blocks.*.mlp.gate_up.weight:gate",
        "model.layers.*.mlp.up_proj.weight": "blocks.*.mlp.gate_up.weight:up",
        "model.layers.*.mlp.down_proj.weight": "blocks.*.mlp.down.weight",
        "model.layers.*.mlp.gate_proj.bias": "blocks.*.mlp.gate_up.bias:gate",
        "model.layers.*.mlp.up_proj.bias": "blocks.*.mlp.gate_up.bias:up",
        "model.layers.*.mlp.down_proj.bias": "blocks.*.mlp.down.bias",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.table",
    }
    ignored_names = frozenset({"model.layers.*.self_attn.rotary_emb.inv_freq"})

    def __init__(self, config: ModelConfig, kernels: KernelSelector) -> None:
        super().__init__(config, kernels)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, kernels=kernels)
        self.rotary = RotaryEmbedding(config.rope, head_dim=config.rotated_dim, kernels=kernels)
        self.blocks = tuple(self.block(config, kernels, layer) for layer in range(config.layers))
        self._take = kernels.select(ops.embedding.take)
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
            reads=self.head.reads,
        )

    def block(self, config: ModelConfig, kernels: KernelSelector, layer: int) -> LlamaBlock:
        """One of the model's blocks."""
        attention = self.attention(config, kernels, layer)
        return LlamaBlock(
            config, kernels, attention=attention, mlp=self.mlp(config, kernels, layer)
        )

    def attention(self, config: ModelConfig, kernels: KernelSelector, layer: int) -> AttentionLayer:
        """A block's attention."""
        return attention_of(config, kernels, layer)

    def mlp(self, config: ModelConfig, kernels: KernelSelector, layer: int) -> Module:
        """A block's feed-forward network."""
        return GatedMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            bias=config.mlp_bias,
            kernels=kernels,
        )

    def pages(
        self, kv: KVStorage, group: int, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """What a layer of attention writes to and reads."""
        return kv.layer(group, layer)

    def forward(self, batch: ForwardBatch, kv: KVStorage) -> torch.Tensor:
        """logits_SV of the sampled tokens, float32."""
        angles = self.rotary(batch.positions_T)
        x_TM: torch.Tensor = self.embedding(batch.token_ids_T)
        residual_TM: torch.Tensor | None = None
        kept = batch.kept
        for index, (block, (group, layer)) in enumerate(
            zip(self.blocks, self.kv_places, strict=True)
        ):
            if kept is not None and index in kept.layers:
                kept.keep(index, block.attention_norm(x_TM, residual_TM)[1])
            pages = self.pages(kv, group, layer)
            x_TM, residual_TM = block(x_TM, residual_TM, angles, batch.groups[group], pages)
        assert residual_TM is not None
        if kept is not None and len(self.blocks) in kept.layers:
            kept.keep(len(self.blocks), self.norm(x_TM, residual_TM)[1])
        sampled_S = batch.sample_token_indices_S
        if sampled_S is not None:
            x_TM, residual_TM = self._take(x_TM, sampled_S), self._take(residual_TM, sampled_S)
        x_SM, _ = self.norm(x_TM, residual_TM)
        logits_SV: torch.Tensor = self.head(x_SM)
        return logits_SV
