// Primitives in plain C++, for any CPU; the compiler may use what every CPU of its target has.
//
// A vector has 16 lanes whatever the instruction set; here it is an array.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tokenspeed::cpu {
namespace {

constexpr int lanes = 16;

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

constexpr int registers = 2;

template <class Vector, class Lane>
inline Vector each(Lane lane) {
    Vector out;
    for (int i = 0; i < lanes; ++i) out.v[i] = lane(i);
    return out;
}

inline Floats splat(float x) {
    return each<Floats>([&](int) { return x; });
}
// Fused as on the other instruction sets, so that results are the same bits; where the CPU has
// no such instruction the library computes it, slowly.
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return ::fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline float first(const Floats& a) {
    return a.v[0];
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
inline Ints load_ints(const void* at) {
    Ints out;
    std::memcpy(&out, at, sizeof out);
    return out;
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

inline Halves splat_halves(std::uint32_t pair) {
    return each<Halves>([&](int) { return pair; });
}

inline float from_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
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
