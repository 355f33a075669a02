"""Attention over paged KV: pieces of positions for tiles of tokens, and their merging.

The rows of a tile are tokens times the query heads that share a KV head, so that each K and V read
serves all of them and decoding fills the matrix unit's tile. Softmax is online (Milakov and
Gimelshein 2018; FlashAttention, Dao et al. 2022), in base 2; a piece leaves its mean of V and the
logarithm of its sum, and pieces are merged by these (Flash-Decoding, Dao et al. 2023).

Bytes bound decoding: a position's K and V, 2 D elements, for 4 D operations a query row, so up to
some 200 rows a KV head on an H200. Operations bound prefill.

Legend: M rows of a tile, N positions of a block, D elements of a head.
"""

import triton
import triton.language as tl

__all__ = ["attend", "finish", "merge", "soften"]


@triton.jit
def finish(mean, lse, sink):
    """A mean of V whose head has one more score, of base 2, that takes its part and gives nothing.

    Rows that saw no position have a logarithm of minus infinity, and give 0.
    """
    top = tl.maximum(lse, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    ours = tl.exp2(lse - top)
    share = ours / (ours + tl.exp2(sink - top))
    return mean * tl.where(lse == -float("inf"), 0.0, share)[:, None]


@triton.jit
def soften(scores, highest, sums):
    """One step of online softmax: new maxima, sums and weights, and what earlier sums shrink by."""
    top = tl.maximum(highest, tl.max(scores, axis=1))
    # Where nothing was seen yet both are minus infinity, and their difference no number.
    base = tl.where(top == -float("inf"), 0.0, top)
    shrink = tl.exp2(highest - base)
    weights = tl.exp2(scores - base[:, None])
    return top, sums * shrink + tl.sum(weights, axis=1), weights, shrink


@triton.jit
def attend(
    q,
    k_pool,
    v_pool,
    table,
    starts,
    items,
    sinks,
    out,
    partial_means,
    partial_lses,
    q_token_stride,
    q_head_stride,
    kv_heads,
    table_stride,
    scale,
    soft_cap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All pieces of one program, for one KV head; `scale` and `soft_cap` are in base 2, WINDOW 0 is
    none."""
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.arange(0, M)
    element = tl.arange(0, D)
    real = element < HEAD_DIM
    head = kv_head * GROUP + row % GROUP
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
        used = token < tokens
        own = position + token
        at_q = (first_token + token).to(tl.int64) * q_token_stride + head * q_head_stride
        inside = used[:, None] & real[None, :]
        queries = tl.load(q + at_q[:, None] + element[None, :], mask=inside, other=0.0)
        lowest = position + 1 - WINDOW if WINDOW else 0
        highest = tl.full((M,), -float("inf"), tl.float32)
        sums = tl.zeros((M,), tl.float32)
        mean = tl.zeros((M, D), tl.float32)
        for at in range(begin, end, N):
            key = at + tl.arange(0, N)
            # What no token of the tile sees is not read: pages behind a window are others' by now.
            there = (key < end) & (key >= lowest)
            page = tl.load(table + slot * table_stride + key // PAGE, mask=there, other=0)
            place = (page.to(tl.int64) * PAGE + key % PAGE) * kv_heads + kv_head
            keys = tl.load(
                k_pool + place[None, :] * HEAD_DIM + element[:, None],
                mask=there[None, :] & real[:, None],
                other=0.0,
            ).to(queries.dtype)
            scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
            if CAPPED:
                # tanh, which is 1 where the exponential is infinite.
                scores = soft_cap - 2.0 * soft_cap / (tl.exp(2.0 * scores / soft_cap) + 1.0)
            seen = there[None, :] & (key[None, :] <= own[:, None])
            if WINDOW:
                seen = seen & (key[None, :] > own[:, None] - WINDOW)
            scores = tl.where(seen, scores, -float("inf"))
            highest, sums, weights, shrink = soften(scores, highest, sums)
            values = tl.load(
                v_pool + place[:, None] * HEAD_DIM + element[None, :],
                mask=there[:, None] & real[None, :],
                other=0.0,
            ).to(queries.dtype)
            mean = mean * shrink[:, None]
            mean = tl.dot(weights.to(queries.dtype), values, mean, input_precision=PRECISION)
        mean = mean / tl.where(sums == 0.0, 1.0, sums)[:, None]
        lse = tl.where(sums == 0.0, -float("inf"), highest + tl.log2(sums))
        if whole:
            if HAS_SINKS:
                sink = tl.load(sinks + head, mask=used, other=0.0) * 1.4426950408889634
                mean = finish(mean, lse, sink)
            at_out = ((first_token + token).to(tl.int64) * kv_heads * GROUP + head) * HEAD_DIM
            tl.store(out + at_out[:, None] + element[None, :], mean, mask=inside)
        else:
            at_partial = (partial * kv_heads + kv_head) * M + row
            tl.store(partial_lses + at_partial, lse)
            tl.store(partial_means + at_partial[:, None] * D + element[None, :], mean)


@triton.jit
def merge(
    merges,
    partial_means,
    partial_lses,
    sinks,
    out,
    blocks,
    heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of one tile, of one of `blocks` blocks of GROUP heads: its pieces in order."""
    tile = tl.program_id(0)
    block = tl.program_id(1)
    row = (tl.program_id(2) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    element = tl.arange(0, D)
    first_token = tl.load(merges + tile * 4)
    tokens = tl.load(merges + tile * 4 + 1)
    head = block * GROUP + row % GROUP
    used = (row // GROUP < tokens) & (head < heads)
    if tl.program_id(2) * ROWS < tokens * GROUP:
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        sums = tl.zeros((ROWS,), tl.float32)
        mean = tl.zeros((ROWS, D), tl.float32)
        for piece in range(tl.load(merges + tile * 4 + 2), tl.load(merges + tile * 4 + 3)):
            at = (piece * blocks + block) * M + row
            lse = tl.load(partial_lses + at, mask=used, other=-float("inf"))
            new = tl.load(
                partial_means + at[:, None] * D + element[None, :], mask=used[:, None], other=0.0
            )
            above = tl.maximum(top, lse)
            base = tl.where(above == -float("inf"), 0.0, above)
            shrink = tl.exp2(top - base)
            weight = tl.exp2(lse - base)
            mean = mean * shrink[:, None] + new * weight[:, None]
            sums = sums * shrink + weight
            top = above
        mean = mean / tl.where(sums == 0.0, 1.0, sums)[:, None]
        if HAS_SINKS:
            lse = tl.where(sums == 0.0, -float("inf"), top + tl.log2(sums))
            sink = tl.load(sinks + head, mask=used, other=0.0) * 1.4426950408889634
            mean = finish(mean, lse, sink)
        at_out = ((first_token + row // GROUP) * heads + head) * HEAD_DIM
        tl.store(
            out + at_out[:, None] + element[None, :],
            mean,
            mask=used[:, None] & (element < HEAD_DIM)[None, :],
        )
