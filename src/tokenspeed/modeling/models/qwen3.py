"""Qwen3 (Yang et al. 2025): Llama with norms of query and key heads; dense, or with experts."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.layers import AttentionLayer, SparseMLP
from tokenspeed.modeling.models.llama import Llama, attention_of
from tokenspeed.modeling.module import Module
from tokenspeed.modeling.placement import Shard, boundary

__all__ = ["Qwen3", "Qwen3Moe"]


@boundary(out=Shard("tp", "vocabulary"))
class Qwen3(Llama):
    """Embedding, blocks, norm, head."""

    weight_names: ClassVar[Mapping[str, str | Sequence[str]]] = {
        **Llama.weight_names,
        "model.layers.*.self_attn.q_norm.weight": "blocks.*.attention.q_norm.weight",
        "model.layers.*.self_attn.k_norm.weight": "blocks.*.attention.k_norm.weight",
    }

    def attention(self, config: ModelConfig, kernels: KernelSelector, layer: int) -> AttentionLayer:
        """A block's attention."""
        return attention_of(config, kernels, layer, head_norm_epsilon=config.norm_epsilon)


@boundary(out=Shard("tp", "vocabulary"))
class Qwen3Moe(Qwen3):
    """Qwen3 with a mixture of experts in most blocks."""

    weight_names: ClassVar[Mapping[str, str | Sequence[str]]] = {
        **Qwen3.weight_names,
        "model.layers.*.mlp.gate.weight": "blocks.*.mlp.router.scores.weight",
        "model.layers.*.mlp.experts.*.gate_proj.weight": "blocks.*.mlp.experts.gate_up:*.gate",
        "model.layers.*.mlp.experts.*.up_proj.weight": "blocks.*.mlp.experts.gate_up:*.up",
        "model.layers.*.mlp.experts.*.down_proj.weight": "blocks.*.mlp.experts.down:*",
    }

    def mlp(self, config: ModelConfig, kernels: KernelSelector, layer: int) -> Module:
        """A block's experts, or its one network."""
        if config.experts is None or layer in config.experts.dense_layers:
            return super().mlp(config, kernels, layer)
        return SparseMLP(config.hidden_size, config.experts, kernels=kernels)
