"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with a bias on queries, keys and values."""

from tokenspeed.kernels import KernelSelector
from tokenspeed.modeling.config import ModelConfig
from tokenspeed.modeling.layers import AttentionLayer
from tokenspeed.modeling.models.llama import Llama, attention_of
from tokenspeed.modeling.placement import Shard, boundary

__all__ = ["Qwen2"]


@boundary(out=Shard("tp", "vocabulary"))
class Qwen2(Llama):
    """Embedding, blocks, norm, head."""

    def attention(self, config: ModelConfig, kernels: KernelSelector, layer: int) -> AttentionLayer:
        """A block's attention."""
        return attention_of(config, kernels, layer, qkv_bias=True, output_bias=False)
