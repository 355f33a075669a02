"""DeepSeek-V2 and V3 (DeepSeek-AI 2024), and Kimi K2 (Moonshot AI 2025), which is built like V3:
latent attention, and experts in groups with some that all tokens share."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling.batch import KVStorage
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.layers import LatentAttention
from tokenspeed.modeling.models.glm4_moe import Glm4Moe
from tokenspeed.modeling.placement import Shard, boundary

__all__ = ["DeepSeek"]

_ATTENTION = "model.layers.*.self_attn"


@boundary(out=Shard("tp", "vocabulary"))
class DeepSeek(Glm4Moe):
    """Embedding, blocks, norm, head."""

    weight_names: ClassVar[Mapping[str, str | Sequence[str]]] = {
        **{
            name: ours
            for name, ours in Glm4Moe.weight_names.items()
            if not name.startswith(_ATTENTION)
        },
        f"{_ATTENTION}.q_proj.weight": "blocks.*.attention.q.weight",
        f"{_ATTENTION}.q_a_proj.weight": "blocks.*.attention.q_down.weight",
        f"{_ATTENTION}.q_a_proj.bias": "blocks.*.attention.q_down.bias",
        f"{_ATTENTION}.q_a_layernorm.weight": "blocks.*.attention.q_norm.weight",
        f"{_ATTENTION}.q_b_proj.weight": "blocks.*.attention.q.weight",
        f"{_ATTENTION}.kv_a_proj_with_mqa.weight": "blocks.*.attention.kv_down.weight",
        f"{_ATTENTION}.kv_a_proj_with_mqa.bias": "blocks.*.attention.kv_down.bias",
        f"{_ATTENTION}.kv_a_layernorm.weight": "blocks.*.attention.heads.kv_norm.weight",
        f"{_ATTENTION}.kv_b_proj.weight": (
            "blocks.*.attention.heads.k_up",
            "blocks.*.attention.heads.v_up",
        ),
        f"{_ATTENTION}.o_proj.weight": "blocks.*.attention.output.weight",
        f"{_ATTENTION}.o_proj.bias": "blocks.*.attention.output.bias",
    }

    def attention(
        self, config: ModelConfig, kernels: KernelSelector, layer: int
    ) -> LatentAttention:
        """A block's attention."""
        assert config.latent is not None
        assert config.attention_scale is not None
        return LatentAttention(
            hidden_size=config.hidden_size,
            heads=config.heads,
            config=config.latent,
            bias=config.attention_bias,
            scale=config.attention_scale,
            kernels=kernels,
        )

    def pages(self, kv: KVStorage, group: int, layer: int) -> torch.Tensor:
        """A layer's latents."""
        return kv.latents(group, layer)
