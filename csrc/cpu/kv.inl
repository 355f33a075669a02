// How pages hold K and V: 32-bit words of elements for each format, and how numbers are rounded.
//
// Of i8, a head's K x becomes y = H (x - offset), where H is the Hadamard matrix of as many
// elements as the largest power of two that divides the head has, unscaled, and y becomes q =
// round(y / s) with s = max |y| / 127. A query is treated the same, so that the sum of products of
// whole numbers, times both scales, is the product of K and query times the size of H. The
// transform spreads elements that stand out over all (Ashkboos et al. 2024, QuaRot), and the offset
// takes off what they have in common over positions, so that either rounds finely enough.

#pragma once

#include "math.inl"

namespace tokenspeed::cpu {
namespace {

// How the words of K are multiplied with those of a query, which has as many elements in 32 bits.
template <KvFormat format>
struct Keys;
// How the words of V are multiplied with those of weights, and what those are.
template <KvFormat format>
struct Values;

template <>
struct Keys<KvFormat::f32> {
    static constexpr int elements = 1;
    using Vector = Floats;
    using Sum = Floats;
    TOKENSPEED_INLINE static Vector load(const std::byte* at) {
        return load_floats(reinterpret_cast<const float*>(at));
    }
    TOKENSPEED_INLINE static Vector splat_word(const std::byte* at) {
        float word;
        __builtin_memcpy(&word, at, sizeof word);
        return splat(word);
    }
    TOKENSPEED_INLINE static void multiply_add(Vector key, Vector query, Sum& sum) {
        sum = fma(query, key, sum);
    }
};
template <>
struct Values<KvFormat::f32> : Keys<KvFormat::f32> {
    static constexpr std::int64_t word_size_bytes = 4;
    static constexpr std::int64_t weight_size_bytes = 4;
    TOKENSPEED_INLINE static void store_weights(Floats p, std::byte* at) {
        store(p, reinterpret_cast<float*>(at));
    }
    TOKENSPEED_INLINE static Floats load_weights(const std::byte* at) { return load(at); }
};

template <>
struct Keys<KvFormat::bf16> {
    static constexpr int elements = 2;
    using Vector = Halves;
    using Sum = Floats;
    TOKENSPEED_INLINE static Vector load(const std::byte* at) { return load_halves(at); }
    TOKENSPEED_INLINE static Vector splat_word(const std::byte* at) {
        std::uint32_t word;
        __builtin_memcpy(&word, at, sizeof word);
        return splat_halves(word);
    }
    TOKENSPEED_INLINE static void multiply_add(Vector key, Vector query, Sum& sum) {
        sum = dot(sum, query, key);
    }
};
template <>
struct Values<KvFormat::bf16> : Keys<KvFormat::bf16> {
    static constexpr std::int64_t word_size_bytes = 4;
    static constexpr std::int64_t weight_size_bytes = 2;
    TOKENSPEED_INLINE static void store_weights(Floats p, std::byte* at) { store_bf16(p, at); }
    TOKENSPEED_INLINE static Floats load_weights(const std::byte* at) { return load_bf16(at); }
};

template <>
struct Keys<KvFormat::i8> {
    static constexpr int elements = 4;
    using Vector = Bytes;
    using Sum = Ints;
    TOKENSPEED_INLINE static Vector load(const std::byte* at) { return load_bytes(at); }
    TOKENSPEED_INLINE static Vector splat_word(const std::byte* at) {
        return splat_quad(reinterpret_cast<const std::int8_t*>(at));
    }
    TOKENSPEED_INLINE static void multiply_add(Vector key, Vector query, Sum& sum) {
        add_dot(sum, key, query);
    }
};
template <>
struct Values<KvFormat::i8> {
    static constexpr int elements = 2;
    static constexpr std::int64_t word_size_bytes = 2;
    static constexpr std::int64_t weight_size_bytes = 2;
    using Vector = Shorts;
    using Sum = Ints;
    TOKENSPEED_INLINE static Vector load(const std::byte* at) { return load_shorts(at); }
    TOKENSPEED_INLINE static Vector splat_word(const std::byte* at) {
        std::uint32_t word;
        __builtin_memcpy(&word, at, sizeof word);
        return splat_shorts(word);
    }
    TOKENSPEED_INLINE static void multiply_add(Vector value, Vector weight, Sum& sum) {
        add_dot(sum, value, weight);
    }
};

TOKENSPEED_INLINE void clear(Floats& sum) {
    sum = splat(0.0f);
}
TOKENSPEED_INLINE void clear(Ints& sum) {
    sum = splat_ints(0);
}

// What K is as unsigned bytes more than it stands for.
constexpr int key_excess = 128;
// Weights of positions are whole numbers up to this, of 16 bits.
constexpr float weight_largest = 32767.0f;

constexpr std::int64_t hadamard_size(std::int64_t dim) {
    return dim & -dim;
}

// x becomes H x in place, where H is unscaled.
inline void hadamard(float* x, std::int64_t dim) {
    for (std::int64_t at = 0; at < dim; at += lanes) {
        const Floats turned = butterfly<2>(butterfly<1>(load_floats(x + at)));
        store(butterfly<8>(butterfly<4>(turned)), x + at);
    }
    for (std::int64_t apart = lanes; apart < hadamard_size(dim); apart *= 2) {
        for (std::int64_t at = 0; at < dim; at += lanes) {
            if ((at & apart) != 0) continue;
            const Floats a = load_floats(x + at), b = load_floats(x + at + apart);
            store(add(a, b), x + at);
            store(sub(a, b), x + at + apart);
        }
    }
}

// Rounds a head to whole numbers in [-127, 127] of the scale that it returns.
inline float round_head(const float* x, std::int64_t dim, std::int8_t* whole) {
    Floats most = splat(0.0f);
    for (std::int64_t at = 0; at < dim; at += lanes) most = max_abs(most, load_floats(x + at));
    const float peak = largest(most);
    // Of less, the inverse of the scale would be infinite.
    const float inverse = peak < 1e-30f ? 0.0f : 127.0f / peak;
    for (std::int64_t at = 0; at < dim; at += lanes) {
        store_bytes(to_ints(mul(load_floats(x + at), splat(inverse))), whole + at);
    }
    return peak < 1e-30f ? 0.0f : peak * (1.0f / 127.0f);
}

// A head's elements as floats.
inline void load_head(const void* from, Element type, std::int64_t dim, float* x) {
    for (std::int64_t at = 0; at < dim; at += lanes)
        store(load_part(from, type, at, lanes), x + at);
}

// Where a head begins in the page that a slot is in.
struct HeadPlace {
    std::byte* k;
    std::byte* v;
};
inline HeadPlace place_of(const KvPages& to, std::int64_t slot, std::int64_t head) {
    const std::int64_t index = slot / to.page_size * to.heads + head;
    return {static_cast<std::byte*>(to.k) + index * to.k_size_bytes(),
            static_cast<std::byte*>(to.v) + index * to.v_size_bytes()};
}

// A head of a row as the pool has its elements: where it lies, or converted to `memory`.
template <KvFormat format>
const std::byte* head_of(const In& rows, std::int64_t row, std::int64_t head, std::int64_t dim,
                         std::byte* memory) {
    constexpr Element type = format == KvFormat::f32 ? Element::f32 : Element::bf16;
    const auto* from =
        static_cast<const std::byte*>(rows.at(row)) + head * dim * rows.element_size_bytes();
    if (rows.type == type) return from;
    for (std::int64_t at = 0; at < dim; at += lanes) {
        store_part(load_part(from, rows.type, at, lanes), memory, type, at, lanes);
    }
    return memory;
}

// Writes K and V of tokens [token, end). Behind the last token of a row V's other half of the pair
// is zeroed: attention multiplies it by 0, and what was there before may be no number.
template <KvFormat format>
void append(const KvAppend& call, std::int64_t token, std::int64_t end, std::int64_t tokens) {
    constexpr int pair = Keys<format>::elements;
    constexpr std::int64_t element = 4 / pair;
    const KvPages& to = call.to;
    alignas(64) std::byte memory[3][head_dim_max * 4];
    for (; token < end; ++token) {
        const std::int64_t slot = call.slots[token];
        const std::int64_t position = slot % to.page_size;
        const bool last = token + 1 == tokens || call.slots[token + 1] != slot + 1;
        // The two of a pair are written together by whoever has the first of them.
        const bool joined = pair == 2 && position % 2 == 0 && !last;
        const bool done =
            pair == 2 && position % 2 == 1 && token > 0 && call.slots[token - 1] == slot - 1;
        for (std::int64_t head = 0; head < to.heads; ++head) {
            const HeadPlace page = place_of(to, slot, head);
            const std::byte* k = head_of<format>(call.k, token, head, to.head_dim, memory[0]);
            for (std::int64_t at = 0; at < to.head_dim; at += pair) {
                __builtin_memcpy(page.k + (at / pair * to.page_size + position) * 4,
                                 k + at * element, 4);
            }
            if (done) continue;
            const std::byte* v = head_of<format>(call.v, token, head, to.value_dim, memory[1]);
            std::byte* const row_v = page.v + position / pair * to.value_dim * 4;
            if constexpr (pair == 1) {
                __builtin_memcpy(row_v, v, static_cast<std::size_t>(to.value_dim * element));
                continue;
            }
            const std::byte* second =
                joined ? head_of<format>(call.v, token + 1, head, to.value_dim, memory[2])
                       : nullptr;
            const auto half = [&](const std::byte* row, std::int64_t at) {
                std::uint16_t bits;
                __builtin_memcpy(&bits, row + at * element, sizeof bits);
                return std::uint32_t{bits};
            };
            for (std::int64_t at = 0; at < to.value_dim; ++at) {
                std::uint32_t word;
                if (position % 2 == 1) {
                    // The first half was written by an earlier step.
                    __builtin_memcpy(&word, row_v + at * 4, sizeof word);
                    word = (word & 0xffff) | half(v, at) << 16;
                } else {
                    word = half(v, at) | (joined ? half(second, at) << 16 : 0);
                }
                __builtin_memcpy(row_v + at * 4, &word, sizeof word);
            }
        }
    }
}

// The same, rounded. What lies behind the last token is a whole number whatever it is.
void append_rounded(const KvAppend& call, std::int64_t token, std::int64_t end) {
    const KvPages& to = call.to;
    constexpr int quad = Keys<KvFormat::i8>::elements;
    alignas(64) float x[head_dim_max];
    alignas(64) std::int8_t whole[head_dim_max];
    const std::int64_t input = call.k.element_size_bytes();
    for (; token < end; ++token) {
        const std::int64_t slot = call.slots[token];
        const std::int64_t position = slot % to.page_size;
        for (std::int64_t head = 0; head < to.heads; ++head) {
            const HeadPlace page = place_of(to, slot, head);
            const std::int64_t first_k = head * to.head_dim;
            load_head(static_cast<const std::byte*>(call.k.at(token)) + first_k * input,
                      call.k.type, to.head_dim, x);
            for (std::int64_t at = 0; call.k_offset != nullptr && at < to.head_dim; at += lanes) {
                const Floats offset =
                    load_part(call.k_offset, call.offset_type, first_k + at, lanes);
                store(sub(load_floats(x + at), offset), x + at);
            }
            hadamard(x, to.head_dim);
            const float k_scale = round_head(x, to.head_dim, whole);
            for (std::int64_t at = 0; at < to.head_dim; at += quad) {
                std::uint32_t word;
                __builtin_memcpy(&word, whole + at, sizeof word);
                word ^= 0x01010101u * key_excess;
                __builtin_memcpy(page.k + (at / quad * to.page_size + position) * 4, &word,
                                 sizeof word);
            }
            __builtin_memcpy(page.k + to.page_size * to.head_dim + position * 4, &k_scale,
                             sizeof k_scale);
            load_head(static_cast<const std::byte*>(call.v.at(token)) + head * to.value_dim * input,
                      call.v.type, to.value_dim, x);
            const float v_scale = round_head(x, to.value_dim, whole);
            std::byte* const row_v = page.v + position / 2 * to.value_dim * 2 + position % 2;
            for (std::int64_t at = 0; at < to.value_dim; ++at) {
                row_v[at * 2] = static_cast<std::byte>(whole[at]);
            }
            __builtin_memcpy(page.v + to.page_size * to.value_dim + position * 4, &v_scale,
                             sizeof v_scale);
        }
    }
}

void append(const KvAppend& call, std::int64_t token, std::int64_t end, std::int64_t tokens) {
    switch (call.to.format) {
        case KvFormat::f32:
            return append<KvFormat::f32>(call, token, end, tokens);
        case KvFormat::bf16:
            return append<KvFormat::bf16>(call, token, end, tokens);
        case KvFormat::i8:
            return append_rounded(call, token, end);
    }
}

}  // namespace
}  // namespace tokenspeed::cpu
