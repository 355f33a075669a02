"""Products grouped by expert, with weights as quantised checkpoints have them.

The pairs and tiles of `moe.py`, the sums of `quantised.py`; all experts' matrices are one, the rows
of an expert behind those of the one before. Few tokens are bound by the bytes of the experts they
choose: half a byte or one for each weight.

Legend: M rows of a tile, N outputs, E experts.
"""

import triton
import triton.language as tl

from tokenspeed.kernels.triton.device.activation import silu
from tokenspeed.kernels.triton.device.moe import tile_of
from tokenspeed.kernels.triton.device.quantised import times_float4, times_float8, times_int4

__all__ = ["down", "gate_up"]


@triton.jit
def product(
    rows,
    row_scales,
    row,
    used,
    weight,
    scales,
    zeros,
    blocks,
    output,
    inside,
    inputs,
    M: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[M, N] sums of rows, by pointers, times rows `output` of a matrix of some kind; FP8 rows have
    scales by number."""
    if KIND == "float8":
        groups = (inputs + GROUP - 1) // GROUP
        of_rows = row_scales + row * groups
        total = times_float8(
            rows,
            of_rows,
            used,
            weight,
            scales,
            blocks,
            output,
            inside,
            inputs,
            groups,
            M,
            N,
            STEP,
        )
    elif KIND == "int4":
        total = times_int4(
            rows,
            used,
            weight,
            scales,
            zeros,
            output,
            inside,
            inputs,
            M,
            N,
            GROUP,
            HAS_ZEROS,
            STEP,
            PRECISION,
        )
    else:
        total = times_float4(
            rows, used, weight, scales, output, inside, inputs, M, N, GROUP, STEP, PRECISION
        )
    return total


@triton.jit
def gate_up(
    x,
    x_scales,
    weight,
    scales,
    zeros,
    blocks,
    bias,
    order,
    counts,
    hidden,
    features,
    inputs,
    per_token,
    held,
    x_stride,
    limit,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LIMITED: tl.constexpr,
    SLOPE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """N / 2 gated features of a tile of pairs: hidden [pairs in the order of experts, F]. Columns
    of the tile are gates and ups in turn, which one thread has beside each other."""
    expert, first, offset, count = tile_of(tl.program_id(0), counts, held, M, E)
    if expert < held:
        pair = offset + tl.arange(0, M)
        ours = pair < count
        token = tl.load(order + first + pair, mask=ours, other=0) // per_token
        row = token.to(tl.int64)
        column = tl.program_id(1) * N + tl.arange(0, N)
        inside = column < 2 * features
        output = expert.to(tl.int64) * 2 * features + column // 2 + (column % 2) * features
        total = product(
            x + row * x_stride,
            x_scales,
            row,
            ours,
            weight,
            scales,
            zeros,
            blocks,
            output,
            inside,
            inputs,
            M,
            N,
            KIND,
            GROUP,
            HAS_ZEROS,
            STEP,
            PRECISION,
        )
        if HAS_BIAS:
            total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate, up = tl.split(tl.reshape(total, (M, N // 2, 2)))
        if LIMITED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
            result = gate / (1.0 + tl.exp(-SLOPE * gate)) * (up + 1.0)
        else:
            result = silu(gate) * up
        feature = tl.program_id(1) * (N // 2) + tl.arange(0, N // 2)
        target = hidden + (first + pair).to(tl.int64)[:, None] * features + feature[None, :]
        tl.store(target, result, mask=ours[:, None] & (feature < features)[None, :])


@triton.jit
def down(
    hidden,
    hidden_scales,
    weight,
    scales,
    zeros,
    blocks,
    bias,
    order,
    counts,
    weights,
    found,
    features,
    outputs,
    held,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """N weighed outputs of a tile of pairs, float32, to where each pair's are."""
    expert, first, offset, count = tile_of(tl.program_id(0), counts, held, M, E)
    if expert < held:
        pair = offset + tl.arange(0, M)
        ours = pair < count
        number = tl.load(order + first + pair, mask=ours, other=0).to(tl.int64)
        row = (first + pair).to(tl.int64)
        column = tl.program_id(1) * N + tl.arange(0, N)
        inside = column < outputs
        output = expert.to(tl.int64) * outputs + column
        result = product(
            hidden + row * features,
            hidden_scales,
            row,
            ours,
            weight,
            scales,
            zeros,
            blocks,
            output,
            inside,
            features,
            M,
            N,
            KIND,
            GROUP,
            HAS_ZEROS,
            STEP,
            PRECISION,
        )
        if HAS_BIAS:
            result += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)[None, :]
        result *= tl.load(weights + number, mask=ours, other=0.0)[:, None]
        target = found + number[:, None] * outputs + column[None, :]
        tl.store(target, result, mask=ours[:, None] & inside[None, :])
