"""Mixtures of experts: routing, alignment, and products grouped by expert.

Pairs of a token and one of its experts are put in the order of experts, stably, so that a tile of
pairs meets one expert's matrix; nothing is counted by atomics, and each sum has one order. Few
tokens are bound by the bytes of the experts they choose, many by operations.

Legend: E experts, K experts of a token, G groups of experts, M rows of a tile, F features of an
expert.
"""

import triton
import triton.language as tl

from tokenspeed.kernels.triton.device.activation import silu

__all__ = ["combine", "count_pairs", "down", "gate_up", "place_pairs", "route"]


@triton.jit
def route(
    logits,
    bias,
    experts,
    weights,
    count,
    size,
    groups,
    groups_kept,
    token_stride,
    scale,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMALISES: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
):
    """One token: `groups` groups of `size` experts as a tile [G, E]; the best, one by one."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, G)
    within = tl.arange(0, E)
    inside = (group < groups)[:, None] & (within < size)[None, :]
    expert = group[:, None] * size + within[None, :]
    none = groups * size
    x = tl.load(logits + token * token_stride + expert, mask=inside, other=-float("inf"))
    x = x.to(tl.float32)
    scores = x
    if SCORING == "softmax":
        powers = tl.exp(x - tl.max(tl.max(x, axis=1), axis=0))
        scores = powers / tl.sum(tl.sum(powers, axis=1), axis=0)
    if SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-x))
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=inside, other=0.0).to(tl.float32)
    choice = tl.where(inside, choice, -float("inf"))
    if G > 1:
        worth = tl.max(choice, axis=1)
        if HAS_BIAS:
            # A group of one expert has no second, whose place minus infinity would take.
            best = tl.min(tl.where(choice == worth[:, None], within[None, :], E), axis=1)
            others = tl.where(within[None, :] == best[:, None], -float("inf"), choice)
            worth += tl.where(size > 1, tl.max(others, axis=1), 0.0)
        worth = tl.where(group < groups, worth, -float("inf"))
        kept = tl.zeros((G,), tl.int32)
        for _ in range(groups_kept):
            open_worth = tl.where((kept == 0) & (group < groups), worth, -float("inf"))
            top = tl.max(open_worth, axis=0)
            first = tl.min(tl.where((kept == 0) & (open_worth == top), group, G), axis=0)
            kept = tl.where(group == first, 1, kept)
        choice = tl.where(kept[:, None] > 0, choice, -float("inf"))
    place = tl.arange(0, K)
    ids = tl.zeros((K,), tl.int32)
    values = tl.full((K,), -float("inf"), tl.float32)
    taken = tl.where(inside, 0, 1)
    for turn in range(count):
        left = tl.where(taken == 0, choice, -float("inf"))
        top = tl.max(tl.max(left, axis=1), axis=0)
        candidates = tl.where((taken == 0) & (left == top), expert, none)
        chosen = tl.min(tl.min(candidates, axis=1), axis=0)
        value = tl.sum(tl.sum(tl.where(expert == chosen, tl.where(inside, scores, 0.0), 0.0), 1), 0)
        ids = tl.where(place == turn, chosen, ids)
        values = tl.where(place == turn, value, values)
        taken = tl.where(expert == chosen, 1, taken)
    used = place < count
    if SCORING == "chosen":
        values = tl.exp(values - tl.max(values, axis=0))
        values = values / tl.sum(values, axis=0)
    if NORMALISES:
        values = values / (tl.sum(tl.where(used, values, 0.0), axis=0) + 1e-20)
    tl.store(experts + token * count + place, ids.to(tl.int64), mask=used)
    tl.store(weights + token * count + place, values * scale, mask=used)


@triton.jit
def count_pairs(experts, counts, pairs, first, BLOCK: tl.constexpr):
    """How many pairs one expert has."""
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        wanted = tl.load(experts + at, mask=at < pairs, other=-1)
        found += (wanted == expert + first).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, axis=0))


@triton.jit
def place_pairs(experts, counts, order, pairs, first, held, E: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of one expert's pairs, behind those of the experts before it."""
    expert = tl.program_id(0)
    others = tl.arange(0, E)
    before = tl.load(counts + others, mask=(others < expert) & (others < held), other=0)
    target = tl.sum(before, axis=0)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ours = tl.load(experts + at, mask=at < pairs, other=-1) == expert + first
        rank = tl.cumsum(ours.to(tl.int32), axis=0)
        tl.store(order + target + rank - 1, at, mask=ours)
        target += tl.sum(ours.to(tl.int32), axis=0)


@triton.jit
def tile_of(tile, counts, held, M: tl.constexpr, E: tl.constexpr):
    """(expert, its first pair, pairs before the tile, pairs of the expert) of a tile of M pairs.

    Expert `held` is none: there are fewer tiles.
    """
    others = tl.arange(0, E)
    found = tl.load(counts + others, mask=others < held, other=0)
    tiles = (found + M - 1) // M
    ends = tl.cumsum(tiles, axis=0)
    expert = tl.sum(((ends <= tile) & (others < held)).to(tl.int32), axis=0)
    first = tl.sum(tl.where(others < expert, found, 0), axis=0)
    before = tl.sum(tl.where(others < expert, tiles, 0), axis=0)
    count = tl.sum(tl.where(others == expert, found, 0), axis=0)
    return expert, first, (tile - before) * M, count


@triton.jit
def gate_up(
    x,
    weight,
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
    HAS_BIAS: tl.constexpr,
    LIMITED: tl.constexpr,
    SLOPE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    INPUTS: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """N gated features of a tile of pairs: hidden [pairs in the order of experts, F]."""
    expert, first, offset, count = tile_of(tl.program_id(0), counts, held, M, E)
    if expert < held:
        pair = offset + tl.arange(0, M)
        ours = pair < count
        number = tl.load(order + first + pair, mask=ours, other=0)
        source = x + (number // per_token).to(tl.int64)[:, None] * x_stride
        feature = tl.program_id(1) * N + tl.arange(0, N)
        inside = feature < features
        row = expert.to(tl.int64) * 2 * features + feature
        gates = weight + row[None, :] * inputs
        ups = weight + (row + features)[None, :] * inputs
        gate = tl.zeros((M, N), tl.float32)
        up = tl.zeros((M, N), tl.float32)
        for start in range(0, inputs, INPUTS):
            at = start + tl.arange(0, INPUTS)
            there = at < inputs
            tile = tl.load(source + at[None, :], mask=ours[:, None] & there[None, :], other=0.0)
            both = there[:, None] & inside[None, :]
            of_gate = tl.load(gates + at[:, None], mask=both, other=0.0)
            of_up = tl.load(ups + at[:, None], mask=both, other=0.0)
            gate = tl.dot(tile, of_gate, gate, input_precision=PRECISION)
            up = tl.dot(tile, of_up, up, input_precision=PRECISION)
        if HAS_BIAS:
            gate += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + row + features, mask=inside, other=0.0).to(tl.float32)[None, :]
        if LIMITED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
            result = gate / (1.0 + tl.exp(-SLOPE * gate)) * (up + 1.0)
        else:
            result = silu(gate) * up
        target = hidden + (first + pair).to(tl.int64)[:, None] * features + feature[None, :]
        tl.store(target, result, mask=ours[:, None] & inside[None, :])


@triton.jit
def down(
    hidden,
    weight,
    bias,
    order,
    counts,
    weights,
    found,
    features,
    outputs,
    held,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    INPUTS: tl.constexpr,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """N weighed outputs of a tile of pairs, float32, to where each pair's are."""
    expert, first, offset, count = tile_of(tl.program_id(0), counts, held, M, E)
    if expert < held:
        pair = offset + tl.arange(0, M)
        ours = pair < count
        number = tl.load(order + first + pair, mask=ours, other=0).to(tl.int64)
        source = hidden + (first + pair).to(tl.int64)[:, None] * features
        output = tl.program_id(1) * N + tl.arange(0, N)
        inside = output < outputs
        row = expert.to(tl.int64) * outputs + output
        matrix = weight + row[None, :] * features
        result = tl.zeros((M, N), tl.float32)
        for start in range(0, features, INPUTS):
            at = start + tl.arange(0, INPUTS)
            there = at < features
            tile = tl.load(source + at[None, :], mask=ours[:, None] & there[None, :], other=0.0)
            part = tl.load(matrix + at[:, None], mask=there[:, None] & inside[None, :], other=0.0)
            result = tl.dot(tile, part, result, input_precision=PRECISION)
        if HAS_BIAS:
            result += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
        result *= tl.load(weights + number, mask=ours, other=0.0)[:, None]
        target = found + number[:, None] * outputs + output[None, :]
        tl.store(target, result, mask=ours[:, None] & inside[None, :])


@triton.jit
def combine(
    found, experts, out, outputs, per_token, first, held, K: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK outputs of one token: the sum over its experts that are held, in their order."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < outputs
    place = tl.arange(0, K)
    none = first + held
    wanted = tl.load(experts + token * per_token + place, mask=place < per_token, other=none)
    wanted = tl.where((wanted >= first) & (wanted < none), wanted, none).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(per_token):
        expert = tl.min(wanted, axis=0)
        pair = tl.min(tl.where(wanted == expert, place, K), axis=0)
        source = found + (token * per_token + pair) * outputs + at
        # Compared as a block: one element's answer is no mask to every version of the interpreter.
        held_here = tl.zeros((BLOCK,), tl.int32) + expert < none
        total += tl.load(source, mask=inside & held_here, other=0.0)
        wanted = tl.where(place == pair, none, wanted)
    tl.store(out + token * outputs + at, total, mask=inside)
