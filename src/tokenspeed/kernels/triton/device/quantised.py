"""Matrix products with quantised weights.

What the matrix unit sees is exact. Scales multiply sums of the inputs that share them, and numbers
are whole ones of five bits beside activations, or FP8 beside FP8: a step of the loop reads inputs
of one scale. Scales of MXFP4 are powers of two and multiply its numbers.

Legend: M rows of a tile, N outputs, STEP inputs of a step.
"""

import triton
import triton.language as tl

__all__ = [
    "product_float8",
    "product_int4",
    "quantise_rows",
    "times_float4",
    "times_float8",
    "times_int4",
]


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
def times_float8(
    rows,
    row_scales,
    used,
    weight,
    scales,
    blocks,
    output,
    inside,
    inputs,
    groups,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
):
    """[M, N] sums of FP8 rows, by pointers, times rows `output` of an FP8 matrix; STEP inputs share
    a scale."""
    block = tl.load(blocks + output, mask=inside, other=0)
    columns = weight + output[None, :] * inputs
    total = tl.zeros((M, N), tl.float32)
    for group in range(groups):
        at = group * STEP + tl.arange(0, STEP)
        there = at < inputs
        left = tl.load(rows[:, None] + at[None, :], mask=used[:, None] & there[None, :], other=0.0)
        right = tl.load(columns + at[:, None], mask=there[:, None] & inside[None, :], other=0.0)
        of_rows = tl.load(row_scales + group, mask=used, other=0.0)
        of_columns = tl.load(scales + block * groups + group)
        total += tl.dot(left, right) * of_rows[:, None] * of_columns[None, :]
    return total


@triton.jit
def times_int4(
    rows,
    used,
    weight,
    scales,
    zeros,
    output,
    inside,
    inputs,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[M, N] sums of rows, by pointers, times rows `output` of a matrix of two numbers a byte; STEP
    divides GROUP, which divides the inputs."""
    HALF: tl.constexpr = STEP // 2
    half = tl.arange(0, HALF)
    sources = rows[:, None] + half[None, :]
    columns = weight + output[None, :] * (inputs // 2) + half[:, None]
    of_groups = output * (inputs // GROUP)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, inputs, STEP):
        both = tl.load(columns + start // 2, mask=inside[None, :], other=0)
        scale = tl.load(scales + of_groups + start // GROUP, mask=inside, other=0.0)
        less = tl.full((N,), 8, tl.int32)
        if HAS_ZEROS:
            less = tl.load(zeros + of_groups + start // GROUP, mask=inside, other=0).to(tl.int32)
        left = tl.load(sources + start, mask=used[:, None], other=0.0)
        right = tl.load(sources + start + HALF, mask=used[:, None], other=0.0)
        low = ((both & 15).to(tl.int32) - less[None, :]).to(tl.float32)
        high = ((both >> 4).to(tl.int32) - less[None, :]).to(tl.float32)
        found = tl.dot(left, low.to(left.dtype), input_precision=PRECISION)
        found = tl.dot(right, high.to(left.dtype), found, input_precision=PRECISION)
        total += found * scale.to(tl.float32)[None, :]
    return total


@triton.jit
def float4(numbers, powers):
    """What numbers of e2m1 stand for times two to the power of `powers` less 127, float32: such a
    product is exact in bfloat16. The least power, which underflows there, counts as zero."""
    number = numbers.to(tl.int32)
    exponent = (number >> 1) & 3
    lowest = number & 1
    doubled = tl.where(exponent == 0, lowest, (lowest + 2) << (tl.maximum(exponent, 1) - 1))
    scale = (powers.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    value = doubled.to(tl.float32) * (0.5 * scale)
    return tl.where(number < 8, value, -value)


@triton.jit
def times_float4(
    rows,
    used,
    weight,
    powers,
    output,
    inside,
    inputs,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same of MXFP4, whose scales multiply its numbers; GROUP divides half a STEP, or STEP is
    GROUP, and STEP divides the inputs."""
    HALF: tl.constexpr = STEP // 2
    half = tl.arange(0, HALF)
    sources = rows[:, None] + half[None, :]
    columns = weight + output[None, :] * (inputs // 2) + half[:, None]
    of_groups = powers + output[None, :] * (inputs // GROUP)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, inputs, STEP):
        both = tl.load(columns + start // 2, mask=inside[None, :], other=0)
        at = (start + half)[:, None]
        low = tl.load(of_groups + at // GROUP, mask=inside[None, :], other=0)
        high = tl.load(of_groups + (at + HALF) // GROUP, mask=inside[None, :], other=0)
        left = tl.load(sources + start, mask=used[:, None], other=0.0)
        right = tl.load(sources + start + HALF, mask=used[:, None], other=0.0)
        lower, upper = float4(both & 15, low), float4(both >> 4, high)
        total = tl.dot(left, lower.to(left.dtype), total, input_precision=PRECISION)
        total = tl.dot(right, upper.to(left.dtype), total, input_precision=PRECISION)
    return total


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
    """A tile of y = x @ weight.T + bias, of FP8 rows and blocks."""
    token = tl.program_id(1) * M + tl.arange(0, M)
    output = tl.program_id(0) * N + tl.arange(0, N)
    used, inside = token < tokens, output < outputs
    row = token.to(tl.int64)
    total = times_float8(
        x + row * inputs,
        x_scales + row * groups,
        used,
        weight,
        scales,
        blocks,
        output.to(tl.int64),
        inside,
        inputs,
        groups,
        M,
        N,
        STEP,
    )
    if HAS_BIAS:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = y + row[:, None] * y_stride + output[None, :]
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
    """A tile of y = x @ weight.T + bias, of two numbers a byte."""
    token = tl.program_id(1) * M + tl.arange(0, M)
    output = tl.program_id(0) * N + tl.arange(0, N)
    used, inside = token < tokens, output < outputs
    row = token.to(tl.int64)
    total = times_int4(
        x + row * x_stride,
        used,
        weight,
        scales,
        zeros,
        output.to(tl.int64),
        inside,
        inputs,
        M,
        N,
        GROUP,
        HAS_ZEROS,
        STEP,
        PRECISION,
    )
    if HAS_BIAS:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = y + row[:, None] * y_stride + output[None, :]
    tl.store(target, total, mask=used[:, None] & inside[None, :])
