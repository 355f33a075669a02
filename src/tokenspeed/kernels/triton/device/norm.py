"""Root-mean-square norms.

A row is read once, held in registers and written once: bytes bound it, and there is one sum a row,
taken over the whole row as one block.
"""

import triton
import triton.language as tl

__all__ = ["rms_norm"]


@triton.jit
def rms_norm(
    x,
    residual,
    weight,
    y,
    total,
    heads,
    features,
    x_token_stride,
    x_head_stride,
    epsilon,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: x [rows of heads] in any order of tokens and heads; the others are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < features
    source = x + row // heads * x_token_stride + row % heads * x_head_stride
    wide = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        wide += tl.load(residual + row * features + at, mask=inside, other=0.0)
        tl.store(total + row * features + at, wide, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / features + epsilon)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * features + at, wide * scale * weights, mask=inside)
