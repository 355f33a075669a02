"""Matrix products whose order of sums does not depend on the number of rows.

A tile of one size for every product, inputs in order, nothing split over programs: of few rows most
of the tile is empty, which costs nothing where weights' bytes are the bound, 2 an output and input
for 2 operations a row.

Legend: M rows of a tile, N outputs, INPUTS inputs of a step.
"""

import triton
import triton.language as tl

__all__ = ["product"]


@triton.jit
def product(
    x,
    weight,
    bias,
    y,
    tokens,
    inputs,
    outputs,
    x_token_stride,
    x_head_stride,
    y_token_stride,
    y_head_stride,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of y[head] = x[head] @ weight[head].T + bias; weights are contiguous."""
    token = tl.program_id(1) * M + tl.arange(0, M)
    output = tl.program_id(0) * N + tl.arange(0, N)
    head = tl.program_id(2).to(tl.int64)
    used, inside = token < tokens, output < outputs
    rows = x + head * x_head_stride + token.to(tl.int64)[:, None] * x_token_stride
    columns = weight + (head * outputs + output)[None, :] * inputs
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, inputs, INPUTS):
        at = start + tl.arange(0, INPUTS)
        there = at < inputs
        left = tl.load(rows + at[None, :], mask=used[:, None] & there[None, :], other=0.0)
        right = tl.load(columns + at[:, None], mask=there[:, None] & inside[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = y + head * y_head_stride + token.to(tl.int64)[:, None] * y_token_stride
    tl.store(target + output[None, :], total, mask=used[:, None] & inside[None, :])
