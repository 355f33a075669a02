"""Sampling from float32 logits.

Every result of a row is computed by one program (argmax: by programs over fixed chunks of the
vocabulary), in an order that nothing but the vocabulary's size decides: a row's token does not
depend on the batch.

Logits become *keys*, integers in the order of logits, so that a threshold is found two bits at a
time, exactly, in 16 passes over a row that stays in the second-level cache.
"""

import triton
import triton.language as tl

__all__ = [
    "apply_bitmask",
    "argmax_chunks",
    "argmax_rows",
    "draw",
    "logprobs",
    "penalise",
]

_LARGEST = tl.constexpr(3.4028234663852886e38)
# exp of it is about the least normal float32; tokens that unlikely are never drawn.
_LEAST_EXPONENT = tl.constexpr(-87.0)


@triton.jit
def numbers(x):
    """Logits as the ops count them: NaN is minus infinity, plus infinity the greatest number."""
    return tl.minimum(tl.where(x == x, x, -float("inf")), _LARGEST)


@triton.jit
def keys(x):
    """int64 in the order of float32 numbers, at least 0; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.to(tl.int64) + 2147483648


@triton.jit
def argmax_chunks(logits, peaks, places, size, row_stride, chunks, BLOCK: tl.constexpr):
    """The likeliest token of one chunk of a row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * row_stride + at, mask=at < size, other=-float("inf"))
    x = numbers(x)
    peak = tl.max(x, axis=0)
    place = tl.min(tl.where(x == peak, at, size), axis=0)
    tl.store(peaks + row * chunks + chunk, peak)
    tl.store(places + row * chunks + chunk, place)


@triton.jit
def argmax_rows(peaks, places, tokens, chunks, BLOCK: tl.constexpr):
    """The likeliest token of a row, from those of its chunks; 0 where none is possible."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(peaks + row * chunks + at, mask=at < chunks, other=-float("inf"))
    peak = tl.max(x, axis=0)
    # Of equal chunks the first, since chunks are in the order of tokens.
    chunk = tl.min(tl.where(x == peak, at, chunks), axis=0)
    place = tl.load(places + row * chunks + chunk)
    tl.store(tokens + row, tl.where(peak == -float("inf"), 0, place).to(tl.int64))


@triton.jit
def scaled_weights(x, peak, temperature):
    """exp of how far logits lie below the peak, over the temperature."""
    exponent = (x - peak) / temperature
    return tl.where(exponent < _LEAST_EXPONENT, 0.0, tl.exp(exponent))


@triton.jit
def draw(
    logits,
    uniforms,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    tokens,
    size,
    row_stride,
    BLOCK: tl.constexpr,
):
    """One row: peak; the key down to which tokens are kept, by top-k and by top-p; the inverse of
    the distribution function over what is kept, in ascending order of id.

    Weights are relative to the peak's. Sums over blocks are float64.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    temperature = tl.maximum(tl.load(temperatures + row).to(tl.float32), 1.1754943508222875e-38)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row).to(tl.float64)
    min_p = tl.load(min_ps + row).to(tl.float32)
    uniform = tl.load(uniforms + row).to(tl.float64)
    lanes = tl.arange(0, BLOCK)

    peak = -float("inf")
    for first in range(0, size, BLOCK):
        at = first + lanes
        x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
        peak = tl.maximum(peak, tl.max(x, axis=0))
    # Where no token is possible all weights are 0 with a peak that is a number.
    peak = tl.maximum(peak, -_LARGEST)
    least = tl.where(min_p > 0.0, tl.log(min_p), -float("inf"))

    # How many tokens min-p keeps.
    kept = tl.full((), 0, tl.int64)
    for first in range(0, size, BLOCK):
        at = first + lanes
        x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
        keeps = ((x - peak) / temperature >= least) & (at < size)
        kept += tl.sum(keeps.to(tl.int64), axis=0)

    # Tokens of greater keys than `bound` are kept, and the first `ties` of that key.
    bound = tl.full((), -1, tl.int64)
    ties = tl.full((), 0, tl.int64)
    if top_k < kept:
        bound = tl.full((), 0, tl.int64)
        for step in range(16):
            unit = tl.full((), 1, tl.int64) << (30 - 2 * step)
            reach1 = tl.full((), 0, tl.int64)
            reach2 = tl.full((), 0, tl.int64)
            reach3 = tl.full((), 0, tl.int64)
            for first in range(0, size, BLOCK):
                at = first + lanes
                x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
                keeps = ((x - peak) / temperature >= least) & (at < size)
                key = tl.where(keeps, keys(x), -1)
                reach1 += tl.sum((key >= bound + unit).to(tl.int64), axis=0)
                reach2 += tl.sum((key >= bound + 2 * unit).to(tl.int64), axis=0)
                reach3 += tl.sum((key >= bound + 3 * unit).to(tl.int64), axis=0)
            bound += unit * (
                (reach1 >= top_k).to(tl.int64)
                + (reach2 >= top_k).to(tl.int64)
                + (reach3 >= top_k).to(tl.int64)
            )
        above = tl.full((), 0, tl.int64)
        for first in range(0, size, BLOCK):
            at = first + lanes
            x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
            keeps = ((x - peak) / temperature >= least) & (at < size)
            above += tl.sum((keeps & (keys(x) > bound)).to(tl.int64), axis=0)
        ties = top_k - above

    if top_p < 1.0:
        total = tl.full((), 0.0, tl.float64)
        seen = tl.full((), 0, tl.int64)
        for first in range(0, size, BLOCK):
            at = first + lanes
            x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
            key = keys(x)
            rank = seen + tl.cumsum((key == bound).to(tl.int64), axis=0)
            seen += tl.sum((key == bound).to(tl.int64), axis=0)
            keeps = ((x - peak) / temperature >= least) & (at < size)
            keeps = keeps & ((key > bound) | ((key == bound) & (rank <= ties)))
            weight = tl.where(keeps, scaled_weights(x, peak, temperature), 0.0)
            total += tl.sum(weight, axis=0).to(tl.float64)
        needed = top_p * total
        low = tl.full((), 0, tl.int64)
        for step in range(16):
            unit = tl.full((), 1, tl.int64) << (30 - 2 * step)
            mass1 = tl.full((), 0.0, tl.float64)
            mass2 = tl.full((), 0.0, tl.float64)
            mass3 = tl.full((), 0.0, tl.float64)
            for first in range(0, size, BLOCK):
                at = first + lanes
                x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
                keeps = ((x - peak) / temperature >= least) & (at < size)
                key = tl.where(keeps, keys(x), -1)
                weight = scaled_weights(x, peak, temperature)
                mass1 += tl.sum(tl.where(key >= low + unit, weight, 0.0), axis=0).to(tl.float64)
                mass2 += tl.sum(tl.where(key >= low + 2 * unit, weight, 0.0), axis=0).to(tl.float64)
                mass3 += tl.sum(tl.where(key >= low + 3 * unit, weight, 0.0), axis=0).to(tl.float64)
            low += unit * (
                (mass1 >= needed).to(tl.int64)
                + (mass2 >= needed).to(tl.int64)
                + (mass3 >= needed).to(tl.int64)
            )
        # At or below top-k's bound the masses counted ties that top-k left out; then all that
        # top-k keeps above it is kept, and of its ties as many as are needed.
        low = tl.maximum(low, bound)
        above_mass = tl.full((), 0.0, tl.float64)
        tie_weight = 0.0
        tied = tl.full((), 0, tl.int64)
        for first in range(0, size, BLOCK):
            at = first + lanes
            x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
            keeps = ((x - peak) / temperature >= least) & (at < size)
            key = tl.where(keeps, keys(x), -1)
            weight = scaled_weights(x, peak, temperature)
            above_mass += tl.sum(tl.where(key > low, weight, 0.0), axis=0).to(tl.float64)
            tie_weight = tl.maximum(tie_weight, tl.max(tl.where(key == low, weight, 0.0), axis=0))
            tied += tl.sum((key == low).to(tl.int64), axis=0)
        if low == bound:
            tied = tl.minimum(tied, ties)
        missing = (needed - above_mass) / tl.maximum(tie_weight, 1e-38).to(tl.float64)
        count = tl.ceil(tl.minimum(missing, 2147483648.0)).to(tl.int64)
        ties = tl.minimum(tl.maximum(count, 1), tied)
        bound = low

    total = tl.full((), 0.0, tl.float64)
    seen = tl.full((), 0, tl.int64)
    for first in range(0, size, BLOCK):
        at = first + lanes
        x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
        key = keys(x)
        keeps = ((x - peak) / temperature >= least) & (at < size)
        tie = (keeps & (key == bound)).to(tl.int64)
        rank = seen + tl.cumsum(tie, axis=0)
        seen += tl.sum(tie, axis=0)
        keeps = keeps & ((key > bound) | ((key == bound) & (rank <= ties)))
        weight = tl.where(keeps, scaled_weights(x, peak, temperature), 0.0)
        total += tl.sum(weight, axis=0).to(tl.float64)

    target = uniform * total
    before = tl.full((), 0.0, tl.float64)
    seen = tl.full((), 0, tl.int64)
    # Rounding may put the target on the last sum: then the last token with a weight is meant.
    last = 0
    chosen = size
    for first in range(0, size, BLOCK):
        at = first + lanes
        x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
        key = keys(x)
        keeps = ((x - peak) / temperature >= least) & (at < size)
        tie = (keeps & (key == bound)).to(tl.int64)
        rank = seen + tl.cumsum(tie, axis=0)
        seen += tl.sum(tie, axis=0)
        keeps = keeps & ((key > bound) | ((key == bound) & (rank <= ties)))
        weight = tl.where(keeps, scaled_weights(x, peak, temperature), 0.0)
        sums = before + tl.cumsum(weight, axis=0).to(tl.float64)
        drawn = keeps & (weight > 0.0) & (sums > target)
        chosen = tl.minimum(chosen, tl.min(tl.where(drawn, at, size), axis=0))
        last = tl.maximum(last, tl.max(tl.where(keeps & (weight > 0.0), at, 0), axis=0))
        before += tl.sum(weight, axis=0).to(tl.float64)
    tl.store(tokens + row, tl.where(chosen < size, chosen, last).to(tl.int64))


@triton.jit
def logprobs(
    logits,
    tokens,
    chosen,
    ids,
    values,
    size,
    row_stride,
    count,
    BLOCK: tl.constexpr,
):
    """One row: the logarithm of its mass, then the next likeliest token, `count` times."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    lanes = tl.arange(0, BLOCK)
    peak = -float("inf")
    for first in range(0, size, BLOCK):
        at = first + lanes
        x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
        peak = tl.maximum(peak, tl.max(x, axis=0))
    peak = tl.maximum(peak, -_LARGEST)
    mass = tl.full((), 0.0, tl.float64)
    for first in range(0, size, BLOCK):
        at = first + lanes
        x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
        mass += tl.sum(tl.exp(x - peak), axis=0).to(tl.float64)
    # A row without a possible token has no mass, and its logarithm must still be a number.
    log_mass = tl.log(tl.maximum(mass, 1e-300)).to(tl.float32)
    own = numbers(tl.load(logits + tl.load(tokens + row)))
    tl.store(chosen + row, tl.maximum(own - peak - log_mass, -_LARGEST))
    last_key = tl.full((), 1, tl.int64) << 40
    last_id = -1
    for place in range(count):
        best_key = tl.full((), -1, tl.int64)
        best_id = size
        for first in range(0, size, BLOCK):
            at = first + lanes
            x = numbers(tl.load(logits + at, mask=at < size, other=-float("inf")))
            key = keys(x)
            later = (key < last_key) | ((key == last_key) & (at > last_id))
            key = tl.where(later & (at < size), key, -1)
            most = tl.max(key, axis=0)
            first_of_them = tl.min(tl.where((key == most) & (key >= 0), at, size), axis=0)
            best_id = tl.where(most > best_key, first_of_them, best_id)
            best_key = tl.maximum(best_key, most)
        best = numbers(tl.load(logits + best_id))
        tl.store(ids + row * count + place, best_id.to(tl.int64))
        tl.store(values + row * count + place, tl.maximum(best - peak - log_mass, -_LARGEST))
        last_key = best_key
        last_id = best_id


@triton.jit
def penalise(
    logits, seen, output_counts, count, repetition, presence, frequency, BLOCK: tl.constexpr
):
    """BLOCK of the tokens seen, of one row."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    token = tl.load(seen + at, mask=inside, other=0)
    occurs = tl.load(output_counts + at, mask=inside, other=0)
    x = tl.load(logits + token, mask=inside, other=0.0)
    x = tl.where(x > 0.0, x / repetition, x * repetition)
    x -= frequency * occurs.to(tl.float32) + presence * (occurs > 0).to(tl.float32)
    tl.store(logits + token, x, mask=inside)


@triton.jit
def apply_bitmask(logits, bitmask, size, row_stride, words, BLOCK: tl.constexpr):
    """BLOCK logits of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    word = tl.load(bitmask + row * words + at // 32, mask=inside, other=-1)
    excluded = ((word >> (at % 32)) & 1) == 0
    impossible = tl.full((BLOCK,), -float("inf"), tl.float32)
    tl.store(logits + row * row_stride + at, impossible, mask=inside & excluded)
