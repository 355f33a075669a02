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
// 16 pairs of 16-bit integers.
struct Shorts {
    __m512i v;
};

constexpr int registers = 32;
// Rows and panels of the register tile over unpacked weights, and rows of that over dense ones.
constexpr int tile_rows = 4;
constexpr int dense_tile_rows = 6;
constexpr int tile_panels = 2;
// Register tiles of attention: queries by vectors of scores, and by vectors of values.
constexpr int score_rows = 6, score_vectors = 4;
constexpr int value_rows = 6, value_vectors = 4;
// Panels read at once for one to ten rows, and how many rows a group has of more.
constexpr int few_rows = 10;
constexpr int few_panels[few_rows] = {4, 4, 2, 2, 2, 2, 2, 2, 2, 2};
constexpr int cut_rows = 6, cut_rows_min = 7, cut_rows_max = 10;
// Rows for which unpacking weights in registers, again for each tile, is less than unpacking them
// to memory once.
constexpr int streamed_rows_max = 32;

inline Floats splat(float x) {
    return {_mm512_set1_ps(x)};
}
inline Floats load_floats(const float* at) {
    return {_mm512_loadu_ps(at)};
}
inline void store(Floats a, float* at) {
    _mm512_storeu_ps(at, a.v);
}
inline Floats add(Floats a, Floats b) {
    return {_mm512_add_ps(a.v, b.v)};
}
inline Floats mul(Floats a, Floats b) {
    return {_mm512_mul_ps(a.v, b.v)};
}
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Floats sub(Floats a, Floats b) {
    return {_mm512_sub_ps(a.v, b.v)};
}
inline Floats div(Floats a, Floats b) {
    return {_mm512_div_ps(a.v, b.v)};
}
inline Floats max(Floats a, Floats b) {
    return {_mm512_max_ps(a.v, b.v)};
}
inline Floats min(Floats a, Floats b) {
    return {_mm512_min_ps(a.v, b.v)};
}
// To the nearest whole number, ties to even.
inline Floats round(Floats a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a times two to the power of n, a whole number in [-126, 127].
inline Floats times_power_of_two(Floats a, Floats n) {
    return {_mm512_scalef_ps(a.v, n.v)};
}
// a where x is not below the bound, and 0 elsewhere.
inline Floats zero_below(Floats x, float bound, Floats a) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(bound), _CMP_GE_OQ), a.v)};
}
// Lanes [from, to) of a; `other` elsewhere.
inline Floats keep(Floats a, int from, int to, float other) {
    const __mmask16 kept = static_cast<__mmask16>((1u << to) - (1u << from));
    return {_mm512_mask_mov_ps(_mm512_set1_ps(other), kept, a.v)};
}
// Lanes of a whose bit of the 16 lowest is set; `other` elsewhere.
inline Floats keep_bits(Floats a, std::uint32_t bits, float other) {
    return {_mm512_mask_mov_ps(_mm512_set1_ps(other), static_cast<__mmask16>(bits), a.v)};
}
// Lanes are added in halves: 8 to 8, 4 to 4, and so on.
inline float sum(Floats a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Floats a) {
    return _mm512_reduce_max_ps(a.v);
}
// a[i] + a[i + apart] in lane i and a[i] - a[i + apart] in lane i + apart, for each i without the
// bit `apart`, which is 1, 2, 4 or 8.
template <int apart>
inline Floats butterfly(Floats a) {
    __m512 other;
    if constexpr (apart == 1) other = _mm512_permute_ps(a.v, 0xb1);
    if constexpr (apart == 2) other = _mm512_permute_ps(a.v, 0x4e);
    if constexpr (apart == 4) other = _mm512_shuffle_f32x4(a.v, a.v, 0xb1);
    if constexpr (apart == 8) other = _mm512_shuffle_f32x4(a.v, a.v, 0x4e);
    constexpr __mmask16 second = apart == 1   ? 0xaaaa
                                 : apart == 2 ? 0xcccc
                                 : apart == 4 ? 0xf0f0
                                              : 0xff00;
    return {_mm512_mask_sub_ps(_mm512_add_ps(a.v, other), second, other, a.v)};
}
inline float first(Floats a) {
    return _mm512_cvtss_f32(a.v);
}

// 16 numbers of other types as floats.
inline Floats load_f16(const std::byte* at) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))};
}
inline Floats load_u8(const std::byte* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
inline Floats load_i8(const std::byte* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
inline Floats to_floats(Ints a) {
    return {_mm512_cvtepi32_ps(a.v)};
}

inline Floats load_bf16(const void* at) {
    const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(at));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
// Rounded to the nearest, ties to even; zero for numbers below the least normal one, as where the
// CPU does it.
inline void store_bf16(Floats a, void* at) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(static_cast<__m256i*>(at), (__m256i)_mm512_cvtneps_pbh(a.v));
#else
    const __m512i given = _mm512_castps_si512(a.v);
    const __mmask16 below = _mm512_testn_epi32_mask(given, _mm512_set1_epi32(0x7f800000));
    const __m512i sign = _mm512_set1_epi32(static_cast<std::int32_t>(0x80000000));
    const __m512i bits = _mm512_mask_and_epi32(given, below, given, sign);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
    _mm256_storeu_si256(static_cast<__m256i*>(at), _mm512_cvtepi32_epi16(high));
#endif
}
// The value where a is at least so much, or else 0.
inline Floats if_at_least(Floats a, float least, Floats value) {
    return {
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_set1_ps(least), _CMP_GE_OQ), value.v)};
}
// The larger magnitude of each lane.
inline Floats max_abs(Floats a, Floats b) {
    return {_mm512_max_ps(_mm512_abs_ps(a.v), _mm512_abs_ps(b.v))};
}
// Merges 16 vectors into one with a lane for each, in four rounds that halve their number: two
// vectors' lanes are put side by side twice, each time half of them, and those are combined.
template <class Vector, class Combine>
inline __m512 merge_lanes(const Vector (&rows)[16], const Combine& combine) {
    __m512 merged[16];
    for (int i = 0; i < 16; ++i) __builtin_memcpy(&merged[i], &rows[i].v, sizeof(__m512));
    for (int i = 0; i < 8; ++i) {
        merged[i] = combine(_mm512_unpacklo_ps(merged[2 * i], merged[2 * i + 1]),
                            _mm512_unpackhi_ps(merged[2 * i], merged[2 * i + 1]));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(merged[2 * i]), b = _mm512_castps_pd(merged[2 * i + 1]);
        merged[i] = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int count = 2; count >= 1; count /= 2) {
        for (int i = 0; i < count; ++i) {
            merged[i] = combine(_mm512_shuffle_f32x4(merged[2 * i], merged[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(merged[2 * i], merged[2 * i + 1], 0xdd));
        }
    }
    return merged[0];
}
// Lane i: the largest of the lanes of a[i].
inline Floats max_of_each(const Floats (&a)[16]) {
    return {merge_lanes(a, [](__m512 x, __m512 y) { return _mm512_max_ps(x, y); })};
}
// Lane i: the sum of the lanes of a[i].
inline Ints sum_of_each(const Ints (&a)[16]) {
    return {_mm512_castps_si512(merge_lanes(a, [](__m512 x, __m512 y) {
        return _mm512_castsi512_ps(
            _mm512_add_epi32(_mm512_castps_si512(x), _mm512_castps_si512(y)));
    }))};
}
// Rounded to the nearest, ties to even.
inline Ints to_ints(Floats a) {
    return {_mm512_cvtps_epi32(a.v)};
}
// The low byte of each lane.
inline void store_bytes(Ints a, std::int8_t* at) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(a.v));
}

// The low 16 bits of each lane, of integers that fit in them.
inline void store_shorts(Ints a, std::byte* at) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(a.v));
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
// Of a fixed-point number with 23 binary places, 1 + what is behind the point.
inline Floats one_and_fraction(Ints fixed) {
    constexpr int a_and_b_or_c = 0xea;
    return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        fixed.v, _mm512_set1_epi32(0x007fffff), _mm512_set1_epi32(0x3f800000), a_and_b_or_c))};
}
// a, from 1 to 2, times two to the power of what is before the point of such a number, rounded
// down, which is at least -127; 0 if that is -127 and a is 1.
inline Floats times_power(Floats a, Ints fixed) {
    const __m512i exponents = _mm512_andnot_si512(_mm512_set1_epi32(0x007fffff), fixed.v);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), exponents))};
}
inline Ints load_ints(const void* at) {
    return {_mm512_loadu_si512(at)};
}

inline Ints add(Ints a, Ints b) {
    return {_mm512_add_epi32(a.v, b.v)};
}
inline Ints sub(Ints a, Ints b) {
    return {_mm512_sub_epi32(a.v, b.v)};
}
// 16 rows of four numbers, a lane of each vector in turn.
inline void store_columns(Floats a, Floats b, Ints c, Ints d, void* at) {
    const __m512i low_ab = _mm512_castps_si512(_mm512_unpacklo_ps(a.v, b.v));
    const __m512i high_ab = _mm512_castps_si512(_mm512_unpackhi_ps(a.v, b.v));
    const __m512i low_cd = _mm512_unpacklo_epi32(c.v, d.v);
    const __m512i high_cd = _mm512_unpackhi_epi32(c.v, d.v);
    const __m512i rows[4] = {
        _mm512_unpacklo_epi64(low_ab, low_cd), _mm512_unpackhi_epi64(low_ab, low_cd),
        _mm512_unpacklo_epi64(high_ab, high_cd), _mm512_unpackhi_epi64(high_ab, high_cd)};
    auto* to = static_cast<__m128i*>(at);
    for (int i = 0; i < 4; ++i) {
        _mm_storeu_si128(to + i, _mm512_extracti32x4_epi32(rows[i], 0));
        _mm_storeu_si128(to + i + 4, _mm512_extracti32x4_epi32(rows[i], 1));
        _mm_storeu_si128(to + i + 8, _mm512_extracti32x4_epi32(rows[i], 2));
        _mm_storeu_si128(to + i + 12, _mm512_extracti32x4_epi32(rows[i], 3));
    }
}
template <int count>
inline Ints shift_left(Ints a) {
    return {_mm512_slli_epi32(a.v, count)};
}

inline Bytes load_bytes(const std::byte* at) {
    return {_mm512_loadu_si512(at)};
}
inline void store(Bytes a, std::byte* at) {
    _mm512_storeu_si512(at, a.v);
}
inline Bytes low_nibbles(Bytes a) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))};
}
inline Bytes high_nibbles(Bytes a) {
    return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}
// q | (plane << shift & mask), where a negative shift goes right; the mask must keep what
// crosses from byte to byte out.
template <int shift, int mask>
inline Bytes or_plane(Bytes q, Bytes plane) {
    __m512i moved = plane.v;
    if constexpr (shift > 0) moved = _mm512_slli_epi16(moved, shift);
    if constexpr (shift < 0) moved = _mm512_srli_epi16(moved, -shift);
    constexpr int a_or_b_and_c = 0xf8;
    return {_mm512_ternarylogic_epi32(q.v, moved, _mm512_set1_epi8(mask), a_or_b_and_c)};
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

// 32 signed bytes.
inline Shorts load_shorts(const std::byte* at) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))};
}
inline Shorts splat_shorts(std::uint32_t pair) {
    return {_mm512_set1_epi32(static_cast<std::int32_t>(pair))};
}
// Adds the lane's two products. In assembly, because the compiler's own function has another type
// of vector than its callers: it would keep tiles of sums twice, as either, and write them to
// memory.
inline void add_dot(Ints& sum, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
    asm("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
#else
    sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v));
#endif
}
// The same of the lane's four products of unsigned a with signed b.
inline void add_dot(Ints& sum, Bytes a, Bytes b) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
#else
    sum = dot(sum, a, b);
#endif
}

inline Halves load_halves(const void* at) {
    return {_mm512_loadu_si512(at)};
}
// Halves of the first and of the second in turn, of the lower and of the upper four of each 8.
inline Halves interleave_low(Halves a, Halves b) {
    return {_mm512_unpacklo_epi16(a.v, b.v)};
}
inline Halves interleave_high(Halves a, Halves b) {
    return {_mm512_unpackhi_epi16(a.v, b.v)};
}
inline Halves splat_halves(std::uint32_t pair) {
    return {_mm512_set1_epi32(static_cast<std::int32_t>(pair))};
}

// 16 numbers and then 16 others, rounded as `store_bf16` does.
inline Halves to_halves(Floats a, Floats b) {
#if defined(__AVX512BF16__)
    return {(__m512i)_mm512_cvtne2ps_pbh(b.v, a.v)};
#else
    alignas(64) std::byte halves[4 * 16];
    store_bf16(a, halves);
    store_bf16(b, halves + 2 * 16);
    return load_halves(halves);
#endif
}
inline void store(Halves a, std::byte* at) {
    _mm512_storeu_si512(at, a.v);
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
