// Primitives in plain C++, for any CPU; the compiler may use what every CPU of its target has.
//
// A vector has 16 lanes whatever the instruction set; here it is an array.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "convert.h"
#include "format.h"

namespace tokenspeed::cpu {
namespace {

struct Floats {
    float v[lanes];
};
struct Ints {
    std::int32_t v[lanes];
};
struct Bytes {
    std::uint8_t v[4 * lanes];
};
// 16 pairs of bfloat16.
struct Halves {
    std::uint32_t v[lanes];
};
// 16 pairs of 16-bit integers.
struct Shorts {
    std::int16_t v[2 * lanes];
};

constexpr int registers = 2;
// Rows and panels of the register tile over unpacked weights, and rows of that over dense ones.
constexpr int tile_rows = 1;
constexpr int dense_tile_rows = 1;
constexpr int tile_panels = 1;
// Register tiles of attention: queries by vectors of scores, and by vectors of values.
constexpr int score_rows = 1, score_vectors = 1;
constexpr int value_rows = 1, value_vectors = 1;
// Panels read at once for one to four rows, and how many rows a group has of more.
constexpr int few_rows = 4;
constexpr int few_panels[few_rows] = {1, 1, 1, 1};
constexpr int cut_rows = 4, cut_rows_min = 2, cut_rows_max = 3;
// Rows for which unpacking weights in registers, again for each tile, is less than unpacking them
// to memory once.
constexpr int streamed_rows_max = 4;

template <class Vector, class Lane>
inline Vector each(Lane lane) {
    Vector out;
    for (int i = 0; i < lanes; ++i) out.v[i] = lane(i);
    return out;
}

inline Floats splat(float x) {
    return each<Floats>([&](int) { return x; });
}
inline Floats load_floats(const float* at) {
    return each<Floats>([&](int i) { return at[i]; });
}
inline void store(const Floats& a, float* at) {
    std::memcpy(at, &a, sizeof a);
}
inline Floats add(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats mul(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] * b.v[i]; });
}
// Fused as on the other instruction sets, so that results are the same bits; where the CPU has
// no such instruction the library computes it, slowly.
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return ::fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Floats sub(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats div(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] / b.v[i]; });
}
inline Floats max(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats min(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// To the nearest whole number, ties to even.
inline Floats round(const Floats& a) {
    return each<Floats>([&](int i) { return ::nearbyintf(a.v[i]); });
}
// a times two to the power of n, a whole number in [-126, 127].
inline Floats times_power_of_two(const Floats& a, const Floats& n) {
    return each<Floats>([&](int i) {
        return a.v[i] * from_bits(static_cast<std::uint32_t>(static_cast<int>(n.v[i]) + 127) << 23);
    });
}
// a where x is not below the bound, and 0 elsewhere.
inline Floats zero_below(const Floats& x, float bound, const Floats& a) {
    return each<Floats>([&](int i) { return x.v[i] >= bound ? a.v[i] : 0.0f; });
}
// Lanes [from, to) of a; `other` elsewhere.
inline Floats keep(const Floats& a, int from, int to, float other) {
    return each<Floats>([&](int i) { return i >= from && i < to ? a.v[i] : other; });
}
// Lanes of a whose bit of the 16 lowest is set; `other` elsewhere.
inline Floats keep_bits(const Floats& a, std::uint32_t bits, float other) {
    return each<Floats>([&](int i) { return (bits >> i & 1) != 0 ? a.v[i] : other; });
}
// Lanes are added in halves: 8 to 8, 4 to 4, and so on.
inline float sum(Floats a) {
    for (int half = lanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    }
    return a.v[0];
}
inline float largest(const Floats& a) {
    float most = a.v[0];
    for (const float one : a.v) most = one > most ? one : most;
    return most;
}
// a[i] + a[i + apart] in lane i and a[i] - a[i + apart] in lane i + apart, for each i without the
// bit `apart`, which is 1, 2, 4 or 8.
template <int apart>
inline Floats butterfly(const Floats& a) {
    return each<Floats>([&](int i) {
        return (i & apart) == 0 ? a.v[i] + a.v[i ^ apart] : a.v[i ^ apart] - a.v[i];
    });
}
inline float first(const Floats& a) {
    return a.v[0];
}

// 16 numbers of other types as floats.
inline Floats load_f16(const std::byte* at) {
    return each<Floats>([&](int i) { return f16_at(at + 2 * i); });
}
inline Floats load_u8(const std::byte* at) {
    return each<Floats>(
        [&](int i) { return static_cast<float>(static_cast<std::uint8_t>(at[i])); });
}
inline Floats load_i8(const std::byte* at) {
    return each<Floats>([&](int i) { return static_cast<float>(static_cast<std::int8_t>(at[i])); });
}
inline Floats to_floats(const Ints& a) {
    return each<Floats>([&](int i) { return static_cast<float>(a.v[i]); });
}

inline Floats load_bf16(const void* at) {
    std::uint16_t halves[lanes];
    std::memcpy(halves, at, sizeof halves);
    return each<Floats>([&](int i) { return bf16_to_f32(halves[i]); });
}
// Rounded to the nearest, ties to even; zero for numbers below the least normal one, as where the
// CPU does it.
inline void store_bf16(const Floats& a, void* at) {
    std::uint16_t halves[lanes];
    for (int i = 0; i < lanes; ++i) {
        const std::uint32_t bits = to_bits(a.v[i]);
        halves[i] = f32_to_bf16(bits & 0x7f800000 ? a.v[i] : from_bits(bits & 0x80000000));
    }
    std::memcpy(at, halves, sizeof halves);
}
// The value where a is at least so much, or else 0.
inline Floats if_at_least(const Floats& a, float least, const Floats& value) {
    return each<Floats>([&](int i) { return a.v[i] >= least ? value.v[i] : 0.0f; });
}
// The larger magnitude of each lane.
inline Floats max_abs(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) {
        const float one = ::fabsf(a.v[i]), other = ::fabsf(b.v[i]);
        return one > other ? one : other;
    });
}
// Lane i: the largest of the lanes of a[i].
inline Floats max_of_each(const Floats (&a)[lanes]) {
    return each<Floats>([&](int i) {
        float largest = a[i].v[0];
        for (const float one : a[i].v) largest = one > largest ? one : largest;
        return largest;
    });
}
// Rounded to the nearest, ties to even.
inline Ints to_ints(const Floats& a) {
    return each<Ints>([&](int i) { return static_cast<std::int32_t>(::lrintf(a.v[i])); });
}
// Lane i: the sum of the lanes of a[i].
inline Ints sum_of_each(const Ints (&a)[lanes]) {
    return each<Ints>([&](int i) {
        std::int32_t total = 0;
        for (const std::int32_t one : a[i].v) total += one;
        return total;
    });
}
// The low byte of each lane, of integers that fit in it.
inline void store_bytes(const Ints& a, std::int8_t* at) {
    for (int i = 0; i < lanes; ++i) at[i] = static_cast<std::int8_t>(a.v[i]);
}

// The low 16 bits of each lane, of integers that fit in them.
inline void store_shorts(const Ints& a, std::byte* at) {
    std::int16_t shorts[lanes];
    for (int i = 0; i < lanes; ++i) shorts[i] = static_cast<std::int16_t>(a.v[i]);
    std::memcpy(at, shorts, sizeof shorts);
}

inline Ints splat_ints(std::int32_t x) {
    return each<Ints>([&](int) { return x; });
}
inline std::int32_t first(const Ints& a) {
    return a.v[0];
}
inline Ints bit_xor(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.v[i] ^ b.v[i]; });
}
// Of a fixed-point number with 23 binary places, 1 + what is behind the point.
inline Floats one_and_fraction(const Ints& fixed) {
    return each<Floats>([&](int i) {
        return from_bits((static_cast<std::uint32_t>(fixed.v[i]) & 0x007fffff) | 0x3f800000);
    });
}
// a, from 1 to 2, times two to the power of what is before the point of such a number, rounded
// down, which is at least -127; 0 if that is -127 and a is 1.
inline Floats times_power(const Floats& a, const Ints& fixed) {
    return each<Floats>([&](int i) {
        return from_bits(to_bits(a.v[i]) + (static_cast<std::uint32_t>(fixed.v[i]) & 0xff800000));
    });
}
inline Ints load_ints(const void* at) {
    Ints out;
    std::memcpy(&out, at, sizeof out);
    return out;
}

inline Ints add(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Ints sub(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.v[i] - b.v[i]; });
}
// 16 rows of four numbers, a lane of each vector in turn.
inline void store_columns(const Floats& a, const Floats& b, const Ints& c, const Ints& d,
                          void* at) {
    auto* to = static_cast<std::byte*>(at);
    for (int i = 0; i < lanes; ++i, to += 16) {
        std::memcpy(to, &a.v[i], 4);
        std::memcpy(to + 4, &b.v[i], 4);
        std::memcpy(to + 8, &c.v[i], 4);
        std::memcpy(to + 12, &d.v[i], 4);
    }
}
template <int count>
inline Ints shift_left(const Ints& a) {
    return each<Ints>([&](int i) { return a.v[i] * (1 << count); });
}

template <class Byte>
inline Bytes each_byte(Byte byte) {
    Bytes out;
    for (int i = 0; i < 4 * lanes; ++i) out.v[i] = static_cast<std::uint8_t>(byte(i));
    return out;
}
inline Bytes load_bytes(const std::byte* at) {
    Bytes out;
    std::memcpy(&out, at, sizeof out);
    return out;
}
inline void store(const Bytes& a, std::byte* at) {
    std::memcpy(at, &a, sizeof a);
}
inline Bytes low_nibbles(const Bytes& a) {
    return each_byte([&](int i) { return a.v[i] & 15; });
}
inline Bytes high_nibbles(const Bytes& a) {
    return each_byte([&](int i) { return a.v[i] >> 4; });
}
// q | (plane << shift & mask), where a negative shift goes right.
template <int shift, int mask>
inline Bytes or_plane(const Bytes& q, const Bytes& plane) {
    return each_byte([&](int i) {
        const int moved = shift > 0 ? plane.v[i] << (shift & 7) : plane.v[i] >> (-shift & 7);
        return q.v[i] | (moved & mask);
    });
}

inline Bytes splat_quad(const std::int8_t* four) {
    Bytes out;
    for (int i = 0; i < lanes; ++i) std::memcpy(out.v + 4 * i, four, 4);
    return out;
}

// sum + the lane's four products of unsigned a with signed b, exactly.
inline Ints dot(const Ints& sum, const Bytes& a, const Bytes& b) {
    return each<Ints>([&](int i) {
        std::int32_t total = sum.v[i];
        for (int k = 4 * i; k < 4 * i + 4; ++k) total += a.v[k] * static_cast<std::int8_t>(b.v[k]);
        return total;
    });
}

// 32 signed bytes.
inline Shorts load_shorts(const std::byte* at) {
    Shorts out;
    for (int i = 0; i < 2 * lanes; ++i) out.v[i] = static_cast<std::int8_t>(at[i]);
    return out;
}
inline Shorts splat_shorts(std::uint32_t pair) {
    Shorts out;
    for (int i = 0; i < lanes; ++i) std::memcpy(out.v + 2 * i, &pair, sizeof pair);
    return out;
}
// Adds the lane's two products.
inline void add_dot(Ints& sum, const Shorts& a, const Shorts& b) {
    for (int i = 0; i < lanes; ++i) {
        sum.v[i] += a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1];
    }
}
// The same of the lane's four products of unsigned a with signed b.
inline void add_dot(Ints& sum, const Bytes& a, const Bytes& b) {
    sum = dot(sum, a, b);
}

inline Halves load_halves(const void* at) {
    Halves out;
    std::memcpy(&out, at, sizeof out);
    return out;
}
template <int first>
inline Halves interleave_fours(const Halves& a, const Halves& b) {
    std::uint16_t x[2 * lanes], y[2 * lanes];
    std::memcpy(x, &a, sizeof x);
    std::memcpy(y, &b, sizeof y);
    return each<Halves>([&](int i) {
        const int from = i / 4 * 8 + first + i % 4;
        return static_cast<std::uint32_t>(y[from]) << 16 | x[from];
    });
}
// 16 numbers and then 16 others, rounded as `store_bf16` does.
inline Halves to_halves(const Floats& a, const Floats& b) {
    std::uint16_t halves[2 * lanes];
    store_bf16(a, halves);
    store_bf16(b, halves + lanes);
    return load_halves(halves);
}
inline void store(const Halves& a, std::byte* at) {
    std::memcpy(at, a.v, sizeof a.v);
}
// Halves of the first and of the second in turn, of the lower and of the upper four of each 8.
inline Halves interleave_low(const Halves& a, const Halves& b) {
    return interleave_fours<0>(a, b);
}
inline Halves interleave_high(const Halves& a, const Halves& b) {
    return interleave_fours<4>(a, b);
}
inline Halves splat_halves(std::uint32_t pair) {
    return each<Halves>([&](int) { return pair; });
}

// sum + the lane's two products, the odd one first.
inline Floats dot(const Floats& sum, const Halves& a, const Halves& b) {
    return each<Floats>([&](int i) {
        const float odd =
            ::fmaf(from_bits(a.v[i] & 0xffff0000), from_bits(b.v[i] & 0xffff0000), sum.v[i]);
        return ::fmaf(from_bits(a.v[i] << 16), from_bits(b.v[i] << 16), odd);
    });
}

// The compiler forgets what it knew of x.
template <class Vector>
inline void veil(Vector& x) {
    asm volatile("" : "+m"(x));
}

}  // namespace
}  // namespace tokenspeed::cpu
