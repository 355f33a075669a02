"""Attention of a prompt's tokens over keys and values that were made of latents.

A pair of a query and a position takes 2 * (192 + 128) operations a head at DeepSeek-V3's sizes,
where absorbed attention takes 2 * (576 + 512); making keys and values takes 2 * 512 * 256 for each
position and head, once for all of the prompt's tokens.

Legend: M rows of a tile, N positions of a block, P elements of a query and a key that are not
rotated, R those that are, V elements of a value.
"""

import triton
import triton.language as tl

from tokenspeed.kernels.triton.device.attention import soften

__all__ = ["attend_made"]


@triton.jit
def attend_made(
    q,
    keys,
    rotated,
    values,
    means,
    lses,
    out,
    tokens,
    context,
    begin,
    end,
    q_token_stride,
    q_head_stride,
    rotated_stride,
    heads,
    scale,
    PLAIN_DIM: tl.constexpr,
    ROTATED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of tokens of one head over positions begin:end, merged with what chunks before gave;
    `scale` in base 2. The first token stands at position `context`."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * M + tl.arange(0, M)
    plain, turned, value = tl.arange(0, P), tl.arange(0, R), tl.arange(0, V)
    is_plain, is_turned, is_value = plain < PLAIN_DIM, turned < ROTATED_DIM, value < VALUE_DIM
    used = token < tokens
    own = context + token
    at_q = q + (token.to(tl.int64) * q_token_stride + head * q_head_stride)[:, None]
    q_plain = tl.load(at_q + plain[None, :], mask=used[:, None] & is_plain[None, :], other=0.0)
    q_turned = tl.load(
        at_q + PLAIN_DIM + turned[None, :], mask=used[:, None] & is_turned[None, :], other=0.0
    )
    highest = tl.full((M,), -float("inf"), tl.float32)
    sums = tl.zeros((M,), tl.float32)
    mean = tl.zeros((M, V), tl.float32)
    # Positions behind the tile's last token are nobody's.
    stop = tl.minimum(end, context + tl.minimum(tokens, (tl.program_id(0) + 1) * M))
    for at in range(begin, stop, N):
        position = at + tl.arange(0, N)
        there = position < stop
        row = (position - begin).to(tl.int64)
        of_head = head * (end - begin) + row
        key = tl.load(
            keys + of_head[:, None] * PLAIN_DIM + plain[None, :],
            mask=there[:, None] & is_plain[None, :],
            other=0.0,
        )
        scores = tl.dot(q_plain, tl.trans(key), input_precision=PRECISION)
        shared = tl.load(
            rotated + row[:, None] * rotated_stride + turned[None, :],
            mask=there[:, None] & is_turned[None, :],
            other=0.0,
        )
        scores = tl.dot(q_turned, tl.trans(shared), scores, input_precision=PRECISION) * scale
        seen = there[None, :] & (position[None, :] <= own[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        highest, sums, weights, shrink = soften(scores, highest, sums)
        found = tl.load(
            values + of_head[:, None] * VALUE_DIM + value[None, :],
            mask=there[:, None] & is_value[None, :],
            other=0.0,
        )
        mean = mean * shrink[:, None]
        mean = tl.dot(weights.to(found.dtype), found, mean, input_precision=PRECISION)
    mean = mean / tl.where(sums == 0.0, 1.0, sums)[:, None]
    lse = tl.where(sums == 0.0, -float("inf"), highest + tl.log2(sums))
    at_out = token.to(tl.int64) * heads + head
    inside = used[:, None] & is_value[None, :]
    if not FIRST:
        # Every token sees the first chunk's first position, so `before` is a number.
        before = tl.load(lses + at_out, mask=used, other=0.0)
        top = tl.maximum(before, lse)
        old, new = tl.exp2(before - top), tl.exp2(lse - top)
        earlier = tl.load(
            means + at_out[:, None] * VALUE_DIM + value[None, :], mask=inside, other=0.0
        )
        mean = (earlier * old[:, None] + mean * new[:, None]) / (old + new)[:, None]
        lse = top + tl.log2(old + new)
    if LAST:
        tl.store(out + at_out[:, None] * VALUE_DIM + value[None, :], mean, mask=inside)
    else:
        tl.store(means + at_out[:, None] * VALUE_DIM + value[None, :], mean, mask=inside)
        tl.store(lses + at_out, lse, mask=used)
