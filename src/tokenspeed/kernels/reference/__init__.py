"""Owns the solution `reference`: every op in readable PyTorch, for any device; never tuned.

A row's result can differ in its last bits with the rows beside it, because PyTorch's matrix
products choose how they sum by the size of the batch. Bit-exactness is for native solutions.
"""

from tokenspeed.kernels.reference import (
    activation,
    attention,
    embedding,
    gemm,
    kvcache,
    latent,
    moe,
    norm,
    partial,
    rope,
    rounded,
    sampling,
)

__all__ = [
    "activation",
    "attention",
    "embedding",
    "gemm",
    "kvcache",
    "latent",
    "moe",
    "norm",
    "partial",
    "rope",
    "rounded",
    "sampling",
]
