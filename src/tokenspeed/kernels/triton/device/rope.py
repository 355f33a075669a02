"""Rotary positions."""

import triton
import triton.language as tl

__all__ = ["angles", "rotate"]


@triton.jit
def angles(positions, frequencies, cos, sin, count, BLOCK: tl.constexpr):
    """One token: the cosine and sine of its position times each frequency, float32."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < count
    position = tl.load(positions + token).to(tl.float32)
    turned = position * tl.load(frequencies + at, mask=inside, other=0.0)
    tl.store(cos + token * count + at, tl.cos(turned), mask=inside)
    tl.store(sin + token * count + at, tl.sin(turned), mask=inside)


@triton.jit
def rotate(
    x,
    cos,
    sin,
    y,
    heads,
    half,
    x_token_stride,
    x_head_stride,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """HEADS heads of one token; element i turns with element i + half."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, BLOCK)
    turns = at < half
    cosine = tl.load(cos + token * half + at, mask=turns, other=0.0)[None, :]
    sine = tl.load(sin + token * half + at, mask=turns, other=0.0)[None, :]
    inside = (head < heads)[:, None] & turns[None, :]
    source = x + token * x_token_stride + head[:, None] * x_head_stride + at[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = y + (token * heads + head[:, None]) * (2 * half) + at[None, :]
    tl.store(target, first * cosine - second * sine, mask=inside)
    tl.store(target + half, second * cosine + first * sine, mask=inside)
