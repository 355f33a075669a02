"""Attention over paged latents (MLA), absorbed: K of a position is its latent, V the front of it.

A position is read once for all query heads of a tile, 576 elements for 2 * (576 + 512) operations
a query row: with 64 rows a tile does 120 operations a byte, so one tile of 16 heads is bound by
bytes and one of 128 heads by operations on an H200 (some 200 a byte). Pieces, online softmax and
merging are those of `attention`.

Legend: M rows of a tile, N positions of a block, V elements of the value, R those behind it.
"""

import triton
import triton.language as tl

from tokenspeed.kernels.triton.device.attention import soften

__all__ = ["attend_latents"]


@triton.jit
def attend_latents(
    q,
    pool,
    table,
    starts,
    items,
    out,
    partial_means,
    partial_lses,
    q_token_stride,
    q_head_stride,
    blocks,
    heads,
    table_stride,
    scale,
    GROUP: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All pieces of one program, for one of `blocks` blocks of GROUP heads; `scale` in base 2."""
    program = tl.program_id(0)
    head_block = tl.program_id(1)
    row = tl.arange(0, M)
    value = tl.arange(0, V)
    behind = tl.arange(0, R)
    real = value < VALUE_DIM
    turned = behind < LATENT_DIM - VALUE_DIM
    head = head_block * GROUP + row % GROUP
    for item in range(tl.load(starts + program), tl.load(starts + program + 1)):
        first_token = tl.load(items + item * 8)
        tokens = tl.load(items + item * 8 + 1)
        position = tl.load(items + item * 8 + 2)
        slot = tl.load(items + item * 8 + 3).to(tl.int64)
        begin = tl.load(items + item * 8 + 4)
        end = tl.load(items + item * 8 + 5)
        partial = tl.load(items + item * 8 + 6).to(tl.int64)
        whole = tl.load(items + item * 8 + 7)

        token = row // GROUP
        used = (token < tokens) & (head < heads)
        own = position + token
        at_q = (
            q
            + ((first_token + token).to(tl.int64) * q_token_stride + head * q_head_stride)[:, None]
        )
        q_value = tl.load(at_q + value[None, :], mask=used[:, None] & real[None, :], other=0.0)
        q_behind = tl.load(
            at_q + VALUE_DIM + behind[None, :], mask=used[:, None] & turned[None, :], other=0.0
        )
        highest = tl.full((M,), -float("inf"), tl.float32)
        sums = tl.zeros((M,), tl.float32)
        mean = tl.zeros((M, V), tl.float32)
        for at in range(begin, end, N):
            key = at + tl.arange(0, N)
            there = key < end
            page = tl.load(table + slot * table_stride + key // PAGE, mask=there, other=0)
            place = pool + ((page.to(tl.int64) * PAGE + key % PAGE) * LATENT_DIM)[:, None]
            values = tl.load(
                place + value[None, :], mask=there[:, None] & real[None, :], other=0.0
            ).to(q_value.dtype)
            keys = tl.load(
                place + VALUE_DIM + behind[None, :],
                mask=there[:, None] & turned[None, :],
                other=0.0,
            ).to(q_value.dtype)
            scores = tl.dot(q_behind, tl.trans(keys), input_precision=PRECISION)
            scores = tl.dot(q_value, tl.trans(values), scores, input_precision=PRECISION) * scale
            seen = there[None, :] & (key[None, :] <= own[:, None])
            scores = tl.where(seen, scores, -float("inf"))
            highest, sums, weights, shrink = soften(scores, highest, sums)
            mean = mean * shrink[:, None]
            mean = tl.dot(weights.to(q_value.dtype), values, mean, input_precision=PRECISION)
        mean = mean / tl.where(sums == 0.0, 1.0, sums)[:, None]
        if whole:
            at_out = ((first_token + token).to(tl.int64) * heads + head) * VALUE_DIM
            tl.store(
                out + at_out[:, None] + value[None, :], mean, mask=used[:, None] & real[None, :]
            )
        else:
            lse = tl.where(sums == 0.0, -float("inf"), highest + tl.log2(sums))
            at_partial = (partial * blocks + head_block) * M + row
            tl.store(partial_lses + at_partial, lse)
            tl.store(partial_means + at_partial[:, None] * V + value[None, :], mean)
