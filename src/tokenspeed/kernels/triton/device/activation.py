"""Gated activations."""

import triton
import triton.language as tl

__all__ = ["gate_and_mul", "gelu_tanh", "silu"]


@triton.jit
def silu(x):
    """x sigmoid(x); exp of what is far below zero is infinite, and then the quotient is 0."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh(x):
    """x / 2 (1 + tanh(u)), which is x sigmoid(2 u)."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def gate_and_mul(gate_up, x, features, row_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK features of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < features
    source = gate_up + row * row_stride + at
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + features, mask=inside, other=0.0).to(tl.float32)
    gate = gelu_tanh(gate) if GELU else silu(gate)
    tl.store(x + row * features + at, gate * up, mask=inside)
