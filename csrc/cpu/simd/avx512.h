// Primitives of AVX-512 (F, BW, DQ, VL), with VNNI and BF16 where the build has them.
//
// A vector has 16 lanes whatever the instruction set: 16 floats, 16 integers, or 16 times 4 bytes.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace tokenspeed::cpu {
namespace {

struct Floats {
    __m512 v;
};
struct Ints {
    __m512i v;
};
struct Bytes {
    __m512i v;
};
// 16 pairs of bfloat16.
struct Halves {
    __m512i v;
};

constexpr int registers = 32;

inline Floats splat(float x) {
    return {_mm512_set1_ps(x)};
}
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline float first(Floats a) {
    return _mm512_cvtss_f32(a.v);
}

inline Ints splat_ints(std::int32_t x) {
    return {_mm512_set1_epi32(x)};
}
inline std::int32_t first(Ints a) {
    return _mm512_cvtsi512_si32(a.v);
}
inline Ints bit_xor(Ints a, Ints b) {
    return {_mm512_xor_si512(a.v, b.v)};
}
inline Ints load_ints(const void* at) {
    return {_mm512_loadu_si512(at)};
}

inline Bytes splat_quad(const std::int8_t* four) {
    return {_mm512_set1_epi32(*reinterpret_cast<const std::int32_t*>(four))};
}

// sum + the lane's four products of unsigned a with signed b, exactly.
inline Ints dot(Ints sum, Bytes a, Bytes b) {
#if defined(__AVX512VNNI__)
    return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
#else
    // Bytes at even and at odd places as 16-bit numbers: 8-bit products would saturate in pairs.
    const __m512i low = _mm512_set1_epi16(0x00ff);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(a.v, low),
                                           _mm512_srai_epi16(_mm512_slli_epi16(b.v, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a.v, 8), _mm512_srai_epi16(b.v, 8));
    return {_mm512_add_epi32(sum.v, _mm512_add_epi32(even, odd))};
#endif
}

inline Halves splat_halves(std::uint32_t pair) {
    return {_mm512_set1_epi32(static_cast<std::int32_t>(pair))};
}

// sum + the lane's two products, the odd one first.
inline Floats dot(Floats sum, Halves a, Halves b) {
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
    const __m512i high = _mm512_set1_epi32(static_cast<std::int32_t>(0xffff0000));
    const auto odd = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
    const auto even = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
    const __m512 half = _mm512_fmadd_ps(odd(a.v), odd(b.v), sum.v);
    return {_mm512_fmadd_ps(even(a.v), even(b.v), half)};
#endif
}

// The compiler forgets what it knew of x.
template <class Vector>
inline void veil(Vector& x) {
    asm volatile("" : "+v"(x.v));
}

}  // namespace
}  // namespace tokenspeed::cpu
