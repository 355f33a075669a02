"""Rotary positions."""

import triton
import triton.language as tl

__all__ = ["angles", "rotate", "rotate_and_append"]


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


@triton.jit
def rotate_and_append(
    q,
    k,
    v,
    cos,
    sin,
    out,
    k_pool,
    v_pool,
    slots,
    heads,
    kv_heads,
    half,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    limit,
    SATURATES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """HEADS heads of one token: of its queries, or behind those of its keys and values, which go to
    its slot. What lies beyond `limit` becomes it where the pool SATURATES."""
    token = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(heads, HEADS)
    at = tl.arange(0, BLOCK)
    turns = at < half
    cosine = tl.load(cos + token * half + at, mask=turns, other=0.0)[None, :]
    sine = tl.load(sin + token * half + at, mask=turns, other=0.0)[None, :]
    if tl.program_id(1) < blocks:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & turns[None, :]
        source = q + token * q_token_stride + head[:, None] * q_head_stride + at[None, :]
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        target = out + (token * heads + head[:, None]) * (2 * half) + at[None, :]
        tl.store(target, first * cosine - second * sine, mask=inside)
        tl.store(target + half, second * cosine + first * sine, mask=inside)
    else:
        head = (tl.program_id(1) - blocks) * HEADS + tl.arange(0, HEADS)
        inside = (head < kv_heads)[:, None] & turns[None, :]
        source = k + token * k_token_stride + head[:, None] * k_head_stride + at[None, :]
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        place = (tl.load(slots + token) * kv_heads + head[:, None]) * (2 * half) + at[None, :]
        # Rounded to the model's type first, as where one op rotates and another one writes.
        turned = (first * cosine - second * sine).to(k.dtype.element_ty)
        _store(k_pool + place, turned, inside, limit, SATURATES)
        turned = (second * cosine + first * sine).to(k.dtype.element_ty)
        _store(k_pool + place + half, turned, inside, limit, SATURATES)
        source = v + token * v_token_stride + head[:, None] * v_head_stride + at[None, :]
        value = tl.load(source, mask=inside, other=0.0)
        _store(v_pool + place, value, inside, limit, SATURATES)
        value = tl.load(source + half, mask=inside, other=0.0)
        _store(v_pool + place + half, value, inside, limit, SATURATES)


@triton.jit
def _store(at, x, mask, limit, SATURATES: tl.constexpr):
    if SATURATES:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -limit), limit)
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)
