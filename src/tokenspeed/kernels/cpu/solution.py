"""Registers every kernel of the solution `cpu`, by importing it."""

from tokenspeed.kernels.cpu import (
    activation,
    attention,
    embedding,
    gemm,
    latent,
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
    "latent",
    "moe",
    "norm",
    "rope",
    "sampling",
]
