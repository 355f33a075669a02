"""Registers every kernel of the solution `cpu`, by importing it."""

from tokenspeed.kernels.cpu import activation, attention, gemm, norm, rope, sampling

__all__ = ["activation", "attention", "gemm", "norm", "rope", "sampling"]
