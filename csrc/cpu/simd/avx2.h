// Primitives of AVX2 with FMA and F16C, and VNNI where the build has it.
//
// A vector has 16 lanes whatever the instruction set; here it takes two registers.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace tokenspeed::cpu {
namespace {

struct Floats {
    __m256 low, high;
};
struct Ints {
    __m256i low, high;
};
struct Bytes {
    __m256i low, high;
};
// 16 pairs of bfloat16.
struct Halves {
    __m256i low, high;
};

constexpr int registers = 8;

inline Floats splat(float x) {
    return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline float first(Floats a) {
    return _mm256_cvtss_f32(a.low);
}

inline Ints splat_ints(std::int32_t x) {
    return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
inline std::int32_t first(Ints a) {
    return _mm256_cvtsi256_si32(a.low);
}
inline Ints bit_xor(Ints a, Ints b) {
    return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
inline Ints load_ints(const void* at) {
    const auto* halves = static_cast<const __m256i*>(at);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}

inline Bytes splat_quad(const std::int8_t* four) {
    const __m256i quad = _mm256_set1_epi32(*reinterpret_cast<const std::int32_t*>(four));
    return {quad, quad};
}

inline __m256i dot(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
    // Bytes at even and at odd places as 16-bit numbers: 8-bit products would saturate in pairs.
    const __m256i low = _mm256_set1_epi16(0x00ff);
    const __m256i even =
        _mm256_madd_epi16(_mm256_and_si256(a, low), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#endif
}

// sum + the lane's four products of unsigned a with signed b, exactly.
inline Ints dot(Ints sum, Bytes a, Bytes b) {
    return {dot(sum.low, a.low, b.low), dot(sum.high, a.high, b.high)};
}

inline Halves splat_halves(std::uint32_t pair) {
    const __m256i pairs = _mm256_set1_epi32(static_cast<std::int32_t>(pair));
    return {pairs, pairs};
}

inline __m256 dot(__m256 sum, __m256i a, __m256i b) {
    const __m256i high = _mm256_set1_epi32(static_cast<std::int32_t>(0xffff0000));
    const auto odd = [&](__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, high)); };
    const auto even = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
    return _mm256_fmadd_ps(even(a), even(b), _mm256_fmadd_ps(odd(a), odd(b), sum));
}

// sum + the lane's two products, the odd one first.
inline Floats dot(Floats sum, Halves a, Halves b) {
    return {dot(sum.low, a.low, b.low), dot(sum.high, a.high, b.high)};
}

// The compiler forgets what it knew of x.
template <class Vector>
inline void veil(Vector& x) {
    asm volatile("" : "+x"(x.low), "+x"(x.high));
}

}  // namespace
}  // namespace tokenspeed::cpu
