"""Matrix products with quantised weights.

Scales multiply sums of the inputs that share them, so that what the matrix unit sees is exact:
whole numbers of five bits beside activations, or FP8 beside FP8. A step of the loop reads the
inputs of one scale.

Legend: M rows of a tile, N outputs, STEP inputs of a step.
"""

import triton
import triton.language as tl

__all__ = ["product_float8", "product_int4", "quantise_rows"]


@triton.jit
def quantise_rows(
    x, values, scales, inputs, groups, x_stride, limit, STEP: tl.constexpr, GROUPS: tl.constexpr
):
    """GROUPS groups of one token to FP8, each times what makes its greatest the type's greatest."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * STEP + tl.arange(0, STEP)[None, :]
    inside = at < inputs
    found = tl.load(x + token * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(found), axis=1)
    scale = tl.where(most == 0.0, 1.0, most / limit)
    # A quotient may round to more than there is.
    scaled = tl.minimum(tl.maximum(found / scale[:, None], -limit), limit)
    tl.store(values + token * inputs + at, scaled.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + token * groups + group, scale, mask=group < groups)


@triton.jit
def product_float8(
    x,
    x_scales,
    weight,
    scales,
    blocks,
    bias,
    y,
    tokens,
    inputs,
    outputs,
    groups,
    y_stride,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of y = x @ weight.T + bias, of FP8 rows and blocks; STEP inputs share a scale."""
    token = tl.program_id(1) * M + tl.arange(0, M)
    output = tl.program_id(0) * N + tl.arange(0, N)
    used, inside = token < tokens, output < outputs
    block = tl.load(blocks + output, mask=inside, other=0)
    rows = x + token.to(tl.int64)[:, None] * inputs
    columns = weight + output.to(tl.int64)[None, :] * inputs
    total = tl.zeros((M, N), tl.float32)
    for group in range(groups):
        at = group * STEP + tl.arange(0, STEP)
        there = at < inputs
        left = tl.load(rows + at[None, :], mask=used[:, None] & there[None, :], other=0.0)
        right = tl.load(columns + at[:, None], mask=there[:, None] & inside[None, :], other=0.0)
        of_rows = tl.load(x_scales + token.to(tl.int64) * groups + group, mask=used, other=0.0)
        of_columns = tl.load(scales + block * groups + group)
        total += tl.dot(left, right) * of_rows[:, None] * of_columns[None, :]
    if HAS_BIAS:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = y + token.to(tl.int64)[:, None] * y_stride + output[None, :]
    tl.store(target, total, mask=used[:, None] & inside[None, :])


@triton.jit
def product_int4(
    x,
    weight,
    scales,
    zeros,
    bias,
    y,
    tokens,
    inputs,
    outputs,
    groups,
    x_stride,
    y_stride,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of y = x @ weight.T + bias, of two numbers a byte; STEP divides GROUP, which divides
    the inputs."""
    HALF: tl.constexpr = STEP // 2
    token = tl.program_id(1) * M + tl.arange(0, M)
    output = tl.program_id(0) * N + tl.arange(0, N)
    used, inside = token < tokens, output < outputs
    half = tl.arange(0, HALF)
    rows = x + token.to(tl.int64)[:, None] * x_stride + half[None, :]
    columns = weight + output.to(tl.int64)[None, :] * (inputs // 2) + half[:, None]
    of_groups = output.to(tl.int64) * groups
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, inputs, STEP):
        both = tl.load(columns + start // 2, mask=inside[None, :], other=0)
        scale = tl.load(scales + of_groups + start // GROUP, mask=inside, other=0.0)
        less = tl.full((N,), 8, tl.int32)
        if HAS_ZEROS:
            less = tl.load(zeros + of_groups + start // GROUP, mask=inside, other=0).to(tl.int32)
        left = tl.load(rows + start, mask=used[:, None], other=0.0)
        right = tl.load(rows + start + HALF, mask=used[:, None], other=0.0)
        low = ((both & 15).to(tl.int32) - less[None, :]).to(tl.float32)
        high = ((both >> 4).to(tl.int32) - less[None, :]).to(tl.float32)
        found = tl.dot(left, low.to(left.dtype), input_precision=PRECISION)
        found = tl.dot(right, high.to(left.dtype), found, input_precision=PRECISION)
        total += found * scale.to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = y + token.to(tl.int64)[:, None] * y_stride + output[None, :]
    tl.store(target, total, mask=used[:, None] & inside[None, :])
