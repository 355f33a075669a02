// Between float and its narrow relatives, one number at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tokenspeed::cpu {
namespace {

inline float from_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline std::uint32_t to_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// IEEE half precision to float, exactly.
inline float f16_at(const std::byte* at) {
    std::uint16_t half;
    std::memcpy(&half, at, sizeof half);
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
    const std::uint32_t rest = half & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + (112u << 23)));
    // A subnormal is a small whole number of 2^-24.
    return from_bits(sign | to_bits(static_cast<float>(rest) * 0x1p-24f));
}

inline float bf16_to_f32(std::uint16_t half) {
    return from_bits(static_cast<std::uint32_t>(half) << 16);
}

// Rounded to the nearest, ties to even; a NaN stays one.
inline std::uint16_t f32_to_bf16(float x) {
    const std::uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace
}  // namespace tokenspeed::cpu
