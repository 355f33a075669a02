"""GLM-4.5 (Zeng et al. 2025): experts chosen by sigmoid with a bias, one shared by all tokens, half
of each head rotated, and in some sizes norms of query and key heads."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.layers import AttentionLayer
from tokenspeed.modeling.models.llama import attention_of
from tokenspeed.modeling.models.qwen3 import Qwen3Moe
from tokenspeed.modeling.placement import Shard, boundary

__all__ = ["Glm4Moe"]


@boundary(out=Shard("tp", "vocabulary"))
class Glm4Moe(Qwen3Moe):
    """Embedding, blocks, norm, head."""

    later_layers_ignored = True
    weight_names: ClassVar[Mapping[str, str | Sequence[str]]] = {
        **Qwen3Moe.weight_names,
        "model.layers.*.mlp.gate.e_score_correction_bias": "blocks.*.mlp.router.bias",
        "model.layers.*.mlp.shared_experts.gate_proj.weight": (
            "blocks.*.mlp.shared.gate_up.weight:gate"
        ),
        "model.layers.*.mlp.shared_experts.up_proj.weight": "blocks.*.mlp.shared.gate_up.weight:up",
        "model.layers.*.mlp.shared_experts.down_proj.weight": "blocks.*.mlp.shared.down.weight",
    }

    def attention(self, config: ModelConfig, kernels: KernelSelector, layer: int) -> AttentionLayer:
        """A block's attention."""
        return attention_of(
            config,
            kernels,
            layer,
            output_bias=False,
            head_norm_epsilon=config.norm_epsilon if config.head_norm else None,
            rotated=config.rope.rotated(config.head_dim),
        )
