"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with a bias on queries, keys and values."""

from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.layers import Attention
from tokenspeed.modeling.models.llama import Llama
from tokenspeed.modeling.placement import Shard, boundary

__all__ = ["Qwen2"]


@boundary(out=Shard("tp", "vocabulary"))
class Qwen2(Llama):
    """Embedding, blocks, norm, head."""

    def attention(self, config: ModelConfig, kernels: KernelSelector, layer: int) -> Attention:
        """A block's attention."""
        return Attention(
            hidden_size=config.hidden_size,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            scale=config.attention_scale,
            qkv_bias=True,
            output_bias=False,
            kernels=kernels,
        )
