"""Registers every kernel of the solution `triton`, by importing it; Triton itself is not loaded."""

from tokenspeed.kernels.triton import (
    activation,
    attention,
    embedding,
    gemm,
    kvcache,
    latent,
    latent_prompt,
    moe,
    norm,
    quantised,
    rope,
    sampling,
)

__all__ = [
    "activation",
    "attention",
    "embedding",
    "gemm",
    "kvcache",
    "latent",
    "latent_prompt",
    "moe",
    "norm",
    "quantised",
    "rope",
    "sampling",
]
