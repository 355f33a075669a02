"""Owns the declarations of ops, one package a family; never computes anything itself."""

from tokenspeed.kernels.ops import (
    activation,
    attention,
    embedding,
    gemm,
    kvcache,
    moe,
    norm,
    rope,
    sampling,
)

__all__ = [
    "activation",
    "attention",
    "embedding",
    "gemm",
    "kvcache",
    "moe",
    "norm",
    "rope",
    "sampling",
]
