"""Owns the layers that models are put together from; never knows a model's name."""

from tokenspeed.modeling.layers.attention import Attention
from tokenspeed.modeling.layers.embedding import Embedding, LMHead
from tokenspeed.modeling.layers.latent import AttentionLayer, LatentAttention, LatentHeads
from tokenspeed.modeling.layers.linear import ColumnLinear, Linear, RowLinear
from tokenspeed.modeling.layers.mlp import GatedMLP
from tokenspeed.modeling.layers.moe import Experts, Router, SparseMLP, Sum
from tokenspeed.modeling.layers.norm import BranchNorm, HeadNorm, RMSNorm
from tokenspeed.modeling.layers.rotary import Angles, RotaryEmbedding

__all__ = [
    "Angles",
    "Attention",
    "AttentionLayer",
    "BranchNorm",
    "ColumnLinear",
    "Embedding",
    "Experts",
    "GatedMLP",
    "HeadNorm",
    "LMHead",
    "LatentAttention",
    "LatentHeads",
    "Linear",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "RowLinear",
    "SparseMLP",
    "Sum",
]
