"""Copies of rows: from tables and batches, and into the KV cache."""

import triton
import triton.language as tl

__all__ = ["append", "take_rows"]


@triton.jit
def take_rows(table, indices, x, features, row_stride, BLOCK: tl.constexpr):
    """BLOCK features of the row that one index names, in x's type."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < features
    source = table + tl.load(indices + row) * row_stride + at
    tl.store(x + row * features + at, tl.load(source, mask=inside, other=0.0), mask=inside)


@triton.jit
def append(
    k,
    v,
    k_pool,
    v_pool,
    slots,
    width,
    head_dim,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    limit,
    SATURATES: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK of one token's elements of all heads to its slot; K, and V where there are both."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    head, element = at // head_dim, at % head_dim
    slot = tl.load(slots + token)
    found = tl.load(k + token * k_token_stride + head * k_head_stride + element, mask=inside)
    if SATURATES:
        # Beyond the greatest number of such a type there is none, not even infinity.
        found = tl.minimum(tl.maximum(found.to(tl.float32), -limit), limit)
    tl.store(k_pool + slot * width + at, found.to(k_pool.dtype.element_ty), mask=inside)
    if BOTH:
        found = tl.load(v + token * v_token_stride + head * v_head_stride + element, mask=inside)
        if SATURATES:
            found = tl.minimum(tl.maximum(found.to(tl.float32), -limit), limit)
        tl.store(v_pool + slot * width + at, found.to(v_pool.dtype.element_ty), mask=inside)
