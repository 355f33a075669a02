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
// 16 pairs of 16-bit integers.
struct Shorts {
    __m256i low, high;
};

constexpr int registers = 8;
// Rows and panels of the register tile over unpacked weights, and rows of that over dense ones.
constexpr int tile_rows = 2;
constexpr int dense_tile_rows = 2;
constexpr int tile_panels = 1;
// Register tiles of attention: queries by vectors of scores, and by vectors of values.
constexpr int score_rows = 5, score_vectors = 1;
constexpr int value_rows = 3, value_vectors = 2;
// Panels read at once for one to four rows, and how many rows a group has of more.
constexpr int few_rows = 4;
constexpr int few_panels[few_rows] = {2, 1, 1, 1};
constexpr int cut_rows = 4, cut_rows_min = 2, cut_rows_max = 3;
// Rows for which unpacking weights in registers, again for each tile, is less than unpacking them
// to memory once.
constexpr int streamed_rows_max = 8;

inline Floats splat(float x) {
    return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
inline Floats load_floats(const float* at) {
    return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)};
}
inline void store(Floats a, float* at) {
    _mm256_storeu_ps(at, a.low);
    _mm256_storeu_ps(at + 8, a.high);
}
inline Floats add(Floats a, Floats b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Floats mul(Floats a, Floats b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats sub(Floats a, Floats b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Floats div(Floats a, Floats b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline Floats max(Floats a, Floats b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Floats min(Floats a, Floats b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
// To the nearest whole number, ties to even.
inline Floats round(Floats a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, nearest), _mm256_round_ps(a.high, nearest)};
}
inline __m256 times_power_of_two(__m256 a, __m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
// a times two to the power of n, a whole number in [-126, 127].
inline Floats times_power_of_two(Floats a, Floats n) {
    return {times_power_of_two(a.low, n.low), times_power_of_two(a.high, n.high)};
}
// a where x is not below the bound, and 0 elsewhere.
inline Floats zero_below(Floats x, float bound, Floats a) {
    const __m256 least = _mm256_set1_ps(bound);
    return {_mm256_and_ps(_mm256_cmp_ps(x.low, least, _CMP_GE_OQ), a.low),
            _mm256_and_ps(_mm256_cmp_ps(x.high, least, _CMP_GE_OQ), a.high)};
}
// Lanes [from, to) of a; `other` elsewhere.
inline Floats keep(Floats a, int from, int to, float other) {
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    const auto pick = [&](__m256 x, __m256i lane) {
        const __m256i out = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(from), lane),
                                            _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(to - 1)));
        return _mm256_blendv_ps(x, _mm256_set1_ps(other), _mm256_castsi256_ps(out));
    };
    return {pick(a.low, low), pick(a.high, high)};
}
// Lanes of a whose bit of the 16 lowest is set; `other` elsewhere.
inline Floats keep_bits(Floats a, std::uint32_t bits, float other) {
    const auto pick = [&](__m256 x, std::uint32_t eight) {
        const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i set = _mm256_cmpeq_epi32(
            _mm256_and_si256(_mm256_set1_epi32(static_cast<std::int32_t>(eight)), lanes), lanes);
        return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(set));
    };
    return {pick(a.low, bits & 255), pick(a.high, bits >> 8 & 255)};
}
// Lanes are added in halves: 8 to 8, 4 to 4, and so on.
inline float sum(Floats a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Floats a) {
    const __m256 eight = _mm256_max_ps(a.low, a.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
template <int apart>
inline __m256 butterfly(__m256 a) {
    __m256 other;
    if constexpr (apart == 1) other = _mm256_permute_ps(a, 0xb1);
    if constexpr (apart == 2) other = _mm256_permute_ps(a, 0x4e);
    if constexpr (apart == 4) other = _mm256_permute2f128_ps(a, a, 0x01);
    constexpr int second = apart == 1 ? 0xaa : apart == 2 ? 0xcc : 0xf0;
    return _mm256_blend_ps(_mm256_add_ps(a, other), _mm256_sub_ps(other, a), second);
}
// a[i] + a[i + apart] in lane i and a[i] - a[i + apart] in lane i + apart, for each i without the
// bit `apart`, which is 1, 2, 4 or 8.
template <int apart>
inline Floats butterfly(Floats a) {
    if constexpr (apart == 8) {
        return {_mm256_add_ps(a.low, a.high), _mm256_sub_ps(a.low, a.high)};
    } else {
        return {butterfly<apart>(a.low), butterfly<apart>(a.high)};
    }
}
inline float first(Floats a) {
    return _mm256_cvtss_f32(a.low);
}

inline Floats to_floats(Ints a) {
    return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
}
// 16 numbers of other types as floats.
inline Floats load_f16(const std::byte* at) {
    const auto* halves = reinterpret_cast<const __m128i*>(at);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline Floats load_u8(const std::byte* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return to_floats({_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))});
}
inline Floats load_i8(const std::byte* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return to_floats({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
}

inline __m256 load_bf16_half(const void* at) {
    const __m128i halves = _mm_loadu_si128(static_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Floats load_bf16(const void* at) {
    return {load_bf16_half(at), load_bf16_half(static_cast<const __m128i*>(at) + 1)};
}
inline __m256i bf16_bits(__m256 a) {
    const __m256i given = _mm256_castps_si256(a);
    const __m256i exponent = _mm256_and_si256(given, _mm256_set1_epi32(0x7f800000));
    const __m256i below = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    const __m256i dropped = _mm256_and_si256(below, _mm256_set1_epi32(0x7fffffff));
    const __m256i bits = _mm256_andnot_si256(dropped, given);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
inline __m256i bf16_halves(Floats a) {
    const __m256i mixed = _mm256_packus_epi32(bf16_bits(a.low), bf16_bits(a.high));
    return _mm256_permute4x64_epi64(mixed, 0xd8);
}
// Rounded to the nearest, ties to even; zero for numbers below the least normal one, as where the
// CPU does it.
inline void store_bf16(Floats a, void* at) {
    _mm256_storeu_si256(static_cast<__m256i*>(at), bf16_halves(a));
}
inline __m256 if_at_least(__m256 a, float least, __m256 value) {
    return _mm256_and_ps(_mm256_cmp_ps(a, _mm256_set1_ps(least), _CMP_GE_OQ), value);
}
// The value where a is at least so much, or else 0.
inline Floats if_at_least(Floats a, float least, Floats value) {
    return {if_at_least(a.low, least, value.low), if_at_least(a.high, least, value.high)};
}
// The larger magnitude of each lane.
inline Floats max_abs(Floats a, Floats b) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const auto abs = [&](__m256 x) { return _mm256_and_ps(x, magnitude); };
    return {_mm256_max_ps(abs(a.low), abs(b.low)), _mm256_max_ps(abs(a.high), abs(b.high))};
}
// Merges eight vectors into one with a lane for each, in three rounds that halve their number: two
// vectors' lanes are put side by side twice, each time half of them, and those are combined.
template <class Combine>
inline __m256 merge_lanes(__m256 (&rows)[8], const Combine& combine) {
    for (int i = 0; i < 4; ++i) {
        rows[i] = combine(_mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]),
                          _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    }
    for (int i = 0; i < 2; ++i) {
        const __m256d a = _mm256_castps_pd(rows[2 * i]), b = _mm256_castps_pd(rows[2 * i + 1]);
        rows[i] = combine(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                          _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return combine(_mm256_permute2f128_ps(rows[0], rows[1], 0x20),
                   _mm256_permute2f128_ps(rows[0], rows[1], 0x31));
}
// Lane i: the largest of the lanes of a[i].
inline Floats max_of_each(const Floats (&a)[16]) {
    const auto larger = [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); };
    __m256 rows[2][8];
    for (int i = 0; i < 16; ++i) rows[i / 8][i % 8] = larger(a[i].low, a[i].high);
    return {merge_lanes(rows[0], larger), merge_lanes(rows[1], larger)};
}
// Rounded to the nearest, ties to even.
inline Ints to_ints(Floats a) {
    return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)};
}
// Lane i: the sum of the lanes of a[i].
inline Ints sum_of_each(const Ints (&a)[16]) {
    const auto total = [](__m256 x, __m256 y) {
        return _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
    };
    __m256 rows[2][8];
    for (int i = 0; i < 16; ++i) {
        rows[i / 8][i % 8] = _mm256_castsi256_ps(_mm256_add_epi32(a[i].low, a[i].high));
    }
    return {_mm256_castps_si256(merge_lanes(rows[0], total)),
            _mm256_castps_si256(merge_lanes(rows[1], total))};
}
// The low byte of each lane, of integers that fit in it.
inline void store_bytes(Ints a, std::int8_t* at) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), bytes);
}

// The low 16 bits of each lane, of integers that fit in them.
inline void store_shorts(Ints a, std::byte* at) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), words);
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
// Of a fixed-point number with 23 binary places, 1 + what is behind the point.
inline __m256 one_and_fraction(__m256i fixed) {
    const __m256i fraction = _mm256_and_si256(fixed, _mm256_set1_epi32(0x007fffff));
    return _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f800000)));
}
inline Floats one_and_fraction(Ints fixed) {
    return {one_and_fraction(fixed.low), one_and_fraction(fixed.high)};
}
// a, from 1 to 2, times two to the power of what is before the point of such a number, rounded
// down, which is at least -127; 0 if that is -127 and a is 1.
inline __m256 times_power(__m256 a, __m256i fixed) {
    const __m256i exponents = _mm256_andnot_si256(_mm256_set1_epi32(0x007fffff), fixed);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponents));
}
inline Floats times_power(Floats a, Ints fixed) {
    return {times_power(a.low, fixed.low), times_power(a.high, fixed.high)};
}
inline Ints load_ints(const void* at) {
    const auto* halves = static_cast<const __m256i*>(at);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}

inline Ints add(Ints a, Ints b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline Ints sub(Ints a, Ints b) {
    return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}
inline void store_columns(__m256 a, __m256 b, __m256i c, __m256i d, void* at) {
    const __m256i low_ab = _mm256_castps_si256(_mm256_unpacklo_ps(a, b));
    const __m256i high_ab = _mm256_castps_si256(_mm256_unpackhi_ps(a, b));
    const __m256i low_cd = _mm256_unpacklo_epi32(c, d);
    const __m256i high_cd = _mm256_unpackhi_epi32(c, d);
    const __m256i rows[4] = {
        _mm256_unpacklo_epi64(low_ab, low_cd), _mm256_unpackhi_epi64(low_ab, low_cd),
        _mm256_unpacklo_epi64(high_ab, high_cd), _mm256_unpackhi_epi64(high_ab, high_cd)};
    auto* to = static_cast<__m128i*>(at);
    for (int i = 0; i < 4; ++i) {
        _mm_storeu_si128(to + i, _mm256_castsi256_si128(rows[i]));
        _mm_storeu_si128(to + i + 4, _mm256_extracti128_si256(rows[i], 1));
    }
}
// 16 rows of four numbers, a lane of each vector in turn.
inline void store_columns(Floats a, Floats b, Ints c, Ints d, void* at) {
    store_columns(a.low, b.low, c.low, d.low, at);
    store_columns(a.high, b.high, c.high, d.high, static_cast<__m128i*>(at) + 8);
}
template <int count>
inline Ints shift_left(Ints a) {
    return {_mm256_slli_epi32(a.low, count), _mm256_slli_epi32(a.high, count)};
}

inline Bytes load_bytes(const std::byte* at) {
    const Ints loaded = load_ints(at);
    return {loaded.low, loaded.high};
}
inline void store(Bytes a, std::byte* at) {
    auto* halves = reinterpret_cast<__m256i*>(at);
    _mm256_storeu_si256(halves, a.low);
    _mm256_storeu_si256(halves + 1, a.high);
}
inline __m256i low_nibbles(__m256i a) {
    return _mm256_and_si256(a, _mm256_set1_epi8(15));
}
inline Bytes low_nibbles(Bytes a) {
    return {low_nibbles(a.low), low_nibbles(a.high)};
}
inline Bytes high_nibbles(Bytes a) {
    return low_nibbles(Bytes{_mm256_srli_epi16(a.low, 4), _mm256_srli_epi16(a.high, 4)});
}
template <int shift, int mask>
inline __m256i or_plane(__m256i q, __m256i plane) {
    if constexpr (shift > 0) plane = _mm256_slli_epi16(plane, shift);
    if constexpr (shift < 0) plane = _mm256_srli_epi16(plane, -shift);
    return _mm256_or_si256(q, _mm256_and_si256(plane, _mm256_set1_epi8(mask)));
}
// q | (plane << shift & mask), where a negative shift goes right; the mask must keep what
// crosses from byte to byte out.
template <int shift, int mask>
inline Bytes or_plane(Bytes q, Bytes plane) {
    return {or_plane<shift, mask>(q.low, plane.low), or_plane<shift, mask>(q.high, plane.high)};
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

// 32 signed bytes.
inline Shorts load_shorts(const std::byte* at) {
    const auto* halves = reinterpret_cast<const __m128i*>(at);
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(halves)),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(halves + 1))};
}
inline Shorts splat_shorts(std::uint32_t pair) {
    const __m256i pairs = _mm256_set1_epi32(static_cast<std::int32_t>(pair));
    return {pairs, pairs};
}
inline void add_dot_shorts(__m256i& sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}
// Adds the lane's two products. In assembly, because the compiler's own function has another type
// of vector than its callers: it would keep tiles of sums twice, as either, and write them to
// memory.
inline void add_dot(Ints& sum, Shorts a, Shorts b) {
    add_dot_shorts(sum.low, a.low, b.low);
    add_dot_shorts(sum.high, a.high, b.high);
}
inline void add_dot_bytes(__m256i& sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
    sum = dot(sum, a, b);
#endif
}
// The same of the lane's four products of unsigned a with signed b.
inline void add_dot(Ints& sum, Bytes a, Bytes b) {
    add_dot_bytes(sum.low, a.low, b.low);
    add_dot_bytes(sum.high, a.high, b.high);
}

inline Halves load_halves(const void* at) {
    const Ints loaded = load_ints(at);
    return {loaded.low, loaded.high};
}
// 16 numbers and then 16 others, rounded as `store_bf16` does.
inline Halves to_halves(Floats a, Floats b) {
    return {bf16_halves(a), bf16_halves(b)};
}
inline void store(Halves a, std::byte* at) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), a.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at) + 1, a.high);
}
// Halves of the first and of the second in turn, of the lower and of the upper four of each 8.
inline Halves interleave_low(Halves a, Halves b) {
    return {_mm256_unpacklo_epi16(a.low, b.low), _mm256_unpacklo_epi16(a.high, b.high)};
}
inline Halves interleave_high(Halves a, Halves b) {
    return {_mm256_unpackhi_epi16(a.low, b.low), _mm256_unpackhi_epi16(a.high, b.high)};
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
