// Elementary functions of vectors, the same bits on every instruction set, and vectors of rows that
// may end within one.

#pragma once

namespace tokenspeed::cpu {
namespace {

constexpr float log2_e = 1.44269504f;

// 2^x: 0 where x is below -126; x is at most 127. The polynomial is the one of degree 5 with the
// least relative error within half of the nearest whole number, and 1 there: 1.6e-7 in float32.
inline Floats exp2(Floats x) {
    const Floats whole = round(max(x, splat(-126.0f)));
    const Floats rest = sub(x, whole);
    Floats power = splat(0.0013264727f);
    for (const float term : {0.009671513f, 0.055507336f, 0.24022242f, 0.693147f, 1.0f}) {
        power = fma(power, rest, splat(term));
    }
    return zero_below(x, -126.0f, times_power_of_two(power, whole));
}

// 2^x as a weight of attention, of x times 2^23, of which the fraction's bits are a number from 1
// to 2 and the others an exponent (Schraudolph 1999): 0 where x is -127 or less; x is at most 1.
// The polynomial is the one of degree 3 with the least relative error that is 1 at 1: 8.6e-5, where
// rounding to bfloat16 gives up to 2e-3.
constexpr float fixed_point = 0x1p23f;
TOKENSPEED_INLINE Floats exp2_weight(Floats x) {
    const Ints fixed = to_ints(max(x, splat(-127.0f * fixed_point)));
    const Floats part = one_and_fraction(fixed);
    Floats power = fma(splat(0.07706724f), part, splat(-0.00355674f));
    power = fma(power, part, splat(0.4710284f));
    return times_power(fma(power, part, splat(0.4554611f)), fixed);
}

// 1 / (1 + e^-x)
inline Floats sigmoid(Floats x) {
    const Floats power = min(mul(x, splat(-log2_e)), splat(127.0f));
    return div(splat(1.0f), add(splat(1.0f), exp2(power)));
}

inline Floats tanh(Floats x) {
    return fma(splat(2.0f), sigmoid(add(x, x)), splat(-1.0f));
}

constexpr std::int64_t size_bytes_of(Element type) {
    return type == Element::f32 ? 4 : 2;
}

// Elements [at, at + count) of a row; lanes from `count` on are 0.
inline Floats load_part(const void* row, Element type, std::int64_t at, std::int64_t count) {
    const auto* from = static_cast<const std::byte*>(row) + at * size_bytes_of(type);
    alignas(64) std::byte whole[lanes * 4];
    if (count < lanes) {
        for (std::byte& byte : whole) byte = std::byte{0};
        __builtin_memcpy(whole, from, static_cast<std::size_t>(count * size_bytes_of(type)));
        from = whole;
    }
    return type == Element::f32 ? load_floats(reinterpret_cast<const float*>(from))
                                : load_bf16(from);
}

inline void store_part(Floats x, void* row, Element type, std::int64_t at, std::int64_t count) {
    auto* to = static_cast<std::byte*>(row) + at * size_bytes_of(type);
    alignas(64) std::byte whole[lanes * 4];
    std::byte* const end = count < lanes ? whole : to;
    if (type == Element::f32) {
        store(x, reinterpret_cast<float*>(end));
    } else {
        store_bf16(x, end);
    }
    if (count < lanes) {
        __builtin_memcpy(to, whole, static_cast<std::size_t>(count * size_bytes_of(type)));
    }
}

// Calls f(at, count) for each vector of a row of so many elements.
template <class F>
inline __attribute__((always_inline)) void each_vector(std::int64_t elements, const F& f) {
    std::int64_t at = 0;
    for (; at + lanes <= elements; at += lanes) f(at, std::int64_t{lanes});
    if (at < elements) f(at, elements - at);
}

}  // namespace
}  // namespace tokenspeed::cpu
