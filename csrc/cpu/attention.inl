// Attention over paged KV, for one token or many.
//
// For one token and one query head:
//
//     for each block of 256 positions, as far as the token sees:
//         s = (q . k) * scale, over words of elements in their order
//         m = max (s log2(e));  p = 2^(s log2(e) - m), rounded to V's type;  l = sum of p
//         o = sum of p v, over pairs of positions in their order
//     M, L, O = the blocks' m, l and o merged from the first to the last;  y = O / L
// where a head with a sink begins with M = sink log2(e), L = 1 and O = 0.
//
// Of rounded K and V (kv.inl) q is rounded as K is, and p times the scale of its position's V to
// whole numbers of 32767ths of the largest such scale that the token sees in the block; l is the
// sum of p itself. Sums of products are whole numbers then.
//
// Positions that a token does not see have p = 0, which changes no sum. So a token's result is the
// same bits whether it is computed alone or among the tokens of a prompt, however that was cut, and
// whichever thread does which blocks.
//
// The query heads of a KV head stand beside each other as rows, and so do tokens: each vector of K
// and V that is read serves all of them. Blocks and softmax: Dao et al. 2022 (FlashAttention);
// blocks of one token on several threads: Dao et al. 2023 (Flash-Decoding).
//
// One token mostly waits for memory. K of a block is read, then its V, then K of the one behind,
// and what comes some 12 KiB later on this path is asked for meanwhile.

#pragma once

#include "kv.inl"

namespace tokenspeed::cpu {
namespace {

constexpr float nothing_seen = -1e30f;
// Ones of bfloat16, by which a sum of products is one of numbers.
constexpr std::uint32_t one_and_one = 0x3f803f80;

// Query rows of a part are worked on in the thread's scratch memory.
constexpr int part_rows_max = 48;
// Positions of a vector of K, and how many such groups a block has.
constexpr int block_groups = block_positions / lanes;

// Which positions a query row sees: [from, to).
struct Seen {
    std::int64_t from, to;
};

struct AttentionScratch {
    std::byte queries[part_rows_max][head_dim_max * 4];
    float scores[part_rows_max][block_positions];
    std::byte weights[part_rows_max][block_positions * 4];
    float block_outputs[part_rows_max][head_dim_max];
    float outputs[part_rows_max][head_dim_max];
    float block_peaks[part_rows_max], block_sums[part_rows_max];
    float peaks[part_rows_max], sums[part_rows_max];
    // Of a row's scores with the block, the largest of each lane.
    float tops[part_rows_max][lanes];
    Seen seen[part_rows_max];
    // Of i8: what a row's sums of products with K start from and are multiplied by, what its sums
    // of products with V are multiplied by, the scales of the block's K and V, and those of V over
    // the largest.
    std::int32_t query_starts[part_rows_max];
    float query_scales[part_rows_max], weight_scales[part_rows_max];
    float key_scales[block_positions], value_scales[block_positions];
    float value_parts[block_positions];
    float value_scale_top;
};

// Where K and V of a block's groups of 16 positions lie.
struct Places {
    const std::byte* keys[block_groups];
    const std::byte* values[block_groups];
    const std::byte* key_scales[block_groups];
    const std::byte* value_scales[block_groups];
};

// The part's geometry.
template <KvFormat format>
struct AttentionView {
    using K = Keys<format>;
    using V = Values<format>;

    const Attention& call;
    const AttentionPart& part;
    std::int64_t group = call.heads / call.kv.heads;
    std::int64_t rows = (part.token_end - part.token) * group;
    std::int64_t first_token = call.rows.query_starts[part.row];
    const std::int32_t* pages =
        call.rows.pages + call.rows.slots[part.row] * call.rows.pages_stride;

    std::int64_t token_of(std::int64_t row) const { return part.token + row / group; }
    Seen seen(std::int64_t row) const {
        if (call.seen != nullptr) {
            const std::int32_t* const token = call.seen + 2 * (first_token + token_of(row));
            return {token[0], token[1]};
        }
        const std::int64_t position = call.rows.context_lens[part.row] + token_of(row);
        const std::int64_t from = call.window == 0 ? 0 : position + 1 - call.window;
        return {from > 0 ? from : 0, position + 1};
    }
    std::int64_t head_of(std::int64_t row) const { return part.kv_head * group + row % group; }
    const std::byte* query(std::int64_t row) const {
        return static_cast<const std::byte*>(call.q.at(first_token + token_of(row))) +
               head_of(row) * call.kv.head_dim * call.q.element_size_bytes();
    }
    std::byte* output(std::int64_t row) const {
        return static_cast<std::byte*>(call.y.at(first_token + token_of(row))) +
               head_of(row) * call.kv.value_dim * call.y.element_size_bytes();
    }
    // From one word of K to the next of the same position.
    std::int64_t keys_stride() const { return call.kv.page_size * 4; }

    // The groups of 16 positions that hold [from, to), which a block that begins at `block` has;
    // the others are left as they are.
    void find(std::int64_t block, std::int64_t from, std::int64_t to, Places& places) const {
        const KvPages& kv = call.kv;
        std::int64_t at = from / lanes * lanes;
        std::int64_t index = at / kv.page_size, within = at % kv.page_size;
        const std::byte *k = nullptr, *v = nullptr;
        for (; at < to; at += lanes, within += lanes) {
            if (within == kv.page_size) {
                within = 0;
                ++index;
            }
            if (within == 0 || k == nullptr) {
                const std::int64_t page = pages[index] * kv.heads + part.kv_head;
                k = static_cast<const std::byte*>(kv.k) + page * kv.k_size_bytes();
                v = static_cast<const std::byte*>(kv.v) + page * kv.v_size_bytes();
            }
            const std::int64_t group = (at - block) / lanes;
            places.keys[group] = k + within * 4;
            places.values[group] = v + within / V::elements * kv.value_dim * V::word_size_bytes;
            if constexpr (format == KvFormat::i8) {
                places.key_scales[group] = k + kv.page_size * kv.head_dim + within * 4;
                places.value_scales[group] = v + kv.page_size * kv.value_dim + within * 4;
            }
        }
    }
};

// Takes a row's query to the scratch memory, as products with K want it.
template <KvFormat format>
void load_query(const AttentionView<format>& view, AttentionScratch& scratch, std::int64_t row) {
    const std::int64_t dim = view.call.kv.head_dim;
    if constexpr (format == KvFormat::i8) {
        alignas(64) float x[head_dim_max];
        load_head(view.query(row), view.call.q.type, dim, x);
        hadamard(x, dim);
        auto* const whole = reinterpret_cast<std::int8_t*>(scratch.queries[row]);
        const float scale = round_head(x, dim, whole);
        std::int32_t sum = 0;
        for (std::int64_t at = 0; at < dim; ++at) sum += whole[at];
        scratch.query_starts[row] = -key_excess * sum;
        scratch.query_scales[row] = scale / static_cast<float>(hadamard_size(dim));
    } else {
        alignas(64) std::byte memory[head_dim_max * 4];
        const std::byte* query = head_of<format>(view.call.q, view.first_token + view.token_of(row),
                                                 view.head_of(row), dim, memory);
        __builtin_memcpy(scratch.queries[row], query,
                         static_cast<std::size_t>(dim * 4 / Keys<format>::elements));
    }
}

// The groups of K and then those of V of a block, and K of the one behind, in the order in which
// they are read. While a group is read, lines of one some groups on are asked for, because CPUs do
// not look beyond a page of memory by themselves; and one line of a group farther on, which finds
// out where its page lies.
template <KvFormat format>
constexpr int groups_ahead = format == KvFormat::i8 ? 12 : 6;
constexpr int groups_touched = 24;
struct Stop {
    const std::byte* at;
    // From one of its lines to the next.
    std::int64_t step;
};
struct Path {
    Stop stops[3 * block_groups + groups_touched];

    template <KvFormat format>
    TOKENSPEED_INLINE const Stop* ahead(int index) const {
        return stops + index + groups_ahead<format>;
    }
    TOKENSPEED_INLINE void touch(int index) const {
        __builtin_prefetch(stops[index + groups_touched].at);
    }
};

// How many of the rows left the next tile takes: all tiles get about as many.
TOKENSPEED_INLINE std::int64_t tile_height(std::int64_t left, std::int64_t most) {
    const std::int64_t tiles = (left + most - 1) / most;
    return (left + tiles - 1) / tiles;
}

// Calls f with the constants of each row and vector of a tile. A tile is kept in registers only if
// all that reads or writes it does so by constants.
#define TOKENSPEED_FLAT __attribute__((always_inline))
template <int rows, int vectors, class F>
TOKENSPEED_INLINE void each_cell(const F& f) {
    unroll<rows>([&]<int m>(Constant<m> row) TOKENSPEED_FLAT {
        unroll<vectors>([&]<int v>(Constant<v> vector) TOKENSPEED_FLAT { f(row, vector); });
    });
}

// Dot products of `rows` queries with `vectors` times 16 keys, which are the block's first or not.
// The first tile that reads them `asks` for lines of what is `ahead` of each vector meanwhile.
template <KvFormat format, bool asks, int rows, int vectors>
void score_tile(AttentionScratch& scratch, std::int64_t row, int at, const std::byte* const* keys,
                bool first, std::int64_t stride, std::int64_t words, const Stop* ahead) {
    using K = Keys<format>;
    typename K::Sum sums[rows][vectors];
    each_cell<rows, vectors>([&]<int m, int v>(Constant<m>, Constant<v>) TOKENSPEED_FLAT {
        if constexpr (format == KvFormat::i8) {
            sums[m][v] = splat_ints(scratch.query_starts[row + m]);
        } else {
            clear(sums[m][v]);
        }
    });
    const std::byte* queries = scratch.queries[row];
    for (std::int64_t word = 0; word < words; ++word) {
        typename K::Vector k[vectors];
        unroll<vectors>([&]<int v>(Constant<v>) TOKENSPEED_FLAT {
            k[v] = K::load(keys[v] + word * stride);
            if constexpr (asks) __builtin_prefetch(ahead[v].at + word * ahead[v].step);
        });
        unroll<rows>([&]<int m>(Constant<m>) TOKENSPEED_FLAT {
            const auto q = K::splat_word(queries + m * head_dim_max * 4 + word * 4);
            unroll<vectors>([&]<int v>(Constant<v>)
                                TOKENSPEED_FLAT { K::multiply_add(k[v], q, sums[m][v]); });
        });
    }
    Floats tops[rows];
    each_cell<rows, vectors>([&]<int m, int v>(Constant<m>, Constant<v>) TOKENSPEED_FLAT {
        Floats scores;
        if constexpr (format == KvFormat::i8) {
            const Floats scales = load_floats(scratch.key_scales + at + v * lanes);
            scores = mul(to_floats(sums[m][v]), scales);
        } else {
            scores = sums[m][v];
        }
        store(scores, scratch.scores[row + m] + at + v * lanes);
        tops[m] = v == 0 ? scores : max(scores, tops[m]);
    });
    unroll<rows>([&]<int m>(Constant<m>) TOKENSPEED_FLAT {
        float* const all = scratch.tops[row + m];
        store(first ? tops[m] : max(tops[m], load_floats(all)), all);
    });
}

// Positions [from, to) of a block that starts at `block`; `from` is a multiple of 16 from there.
struct Span {
    std::int64_t block;
    int from, to;

    // `to` as a whole number of vectors.
    TOKENSPEED_INLINE int whole_to() const { return (to + lanes - 1) / lanes * lanes; }
};

// Scores of all rows with the positions of a span.
template <KvFormat format>
void score_block(const AttentionView<format>& view, AttentionScratch& scratch, const Span& span,
                 const Places& places, const Path& path) {
    const std::int64_t words = view.call.kv.head_dim / Keys<format>::elements;
    for (int at = span.from; at < span.to; at += score_vectors * lanes) {
        const std::int64_t left = (span.whole_to() - at) / lanes;
        const int first = (at - span.from) / lanes;
        for (int v = 0; v < score_vectors; ++v) path.touch(first + v);
        for (std::int64_t row = 0; row < view.rows;) {
            const std::int64_t height = tile_height(view.rows - row, score_rows);
            with_count<score_rows>(height, [&]<int rows>(Constant<rows>) {
                with_count<score_vectors>(
                    left < score_vectors ? left : score_vectors,
                    [&]<int vectors>(Constant<vectors>) {
                        const auto tile = row == 0 ? score_tile<format, true, rows, vectors>
                                                   : score_tile<format, false, rows, vectors>;
                        tile(scratch, row, at, places.keys + at / lanes, at == span.from,
                             view.keys_stride(), words, path.ahead<format>(first));
                    });
            });
            row += height;
        }
    }
}

// What a row sees of a span, as positions of its block: [from, to).
struct Lanes {
    int from, to;

    // Whether it is all of a vector.
    TOKENSPEED_INLINE bool cover(int at) const { return from <= at && at + lanes <= to; }
    // The vector with lanes that are not among them `other`.
    TOKENSPEED_INLINE Floats keep_of(Floats a, int at, float other) const {
        const auto within = [&](int position) {
            const int lane = position - at;
            return lane < 0 ? 0 : lane > lanes ? lanes : lane;
        };
        return cover(at) ? a : keep(a, within(from), within(to), other);
    }
};

// By what a row's sums of products are multiplied to be scores.
template <KvFormat format>
float score_scale(const Attention& call, const AttentionScratch& scratch, std::int64_t row) {
    return format == KvFormat::i8 ? call.scale * scratch.query_scales[row] : call.scale;
}

// And by what to be logarithms of weights to base 2, which capped scores are.
template <KvFormat format>
float score_factor(const Attention& call, const AttentionScratch& scratch, std::int64_t row) {
    return call.soft_cap != 0.0f ? 1.0f : score_scale<format>(call, scratch, row) * log2_e;
}

// Caps a row's scores and finds the largest weight's logarithm.
template <KvFormat format>
float find_peak(const Attention& call, AttentionScratch& scratch, std::int64_t row,
                const Span& span, const Lanes& seen) {
    float* const scores = scratch.scores[row];
    const float factor = score_factor<format>(call, scratch, row);
    const bool capped = call.soft_cap != 0.0f;
    for (int at = span.from; capped && at < span.to; at += lanes) {
        const Floats scale = splat(score_scale<format>(call, scratch, row));
        const Floats score = mul(load_floats(scores + at), scale);
        const Floats curve = tanh(div(score, splat(call.soft_cap)));
        store(mul(curve, splat(call.soft_cap * log2_e)), scores + at);
    }
    // A factor that is not negative does not change which is the largest.
    const bool ordered = factor >= 0.0f;
    if (seen.from <= span.from && span.whole_to() <= seen.to && !capped && ordered) {
        return largest(load_floats(scratch.tops[row])) * factor;
    }
    Floats most = splat(nothing_seen);
    for (int at = span.from; at < span.to; at += lanes) {
        const Floats score = mul(load_floats(scores + at), splat(factor));
        most = max(seen.keep_of(score, at, nothing_seen), most);
    }
    return largest(most);
}

// Of rounded V: by what a weight is multiplied to be a whole number of a row whose largest scale of
// V is `top`, before its position's own scale.
TOKENSPEED_INLINE float weight_factor(float top) {
    // Of less, the inverse would be infinite.
    return top < 1e-30f ? 0.0f : weight_largest / top;
}

// Weights of a row over a span, of which it sees some positions, and their sum.
template <KvFormat format>
void weigh(const Attention& call, AttentionScratch& scratch, std::int64_t row, const Span& span,
           const Lanes& seen) {
    using V = Values<format>;
    const float* const scores = scratch.scores[row];
    std::byte* const weights = scratch.weights[row];
    // Of powers in fixed point; scaling by a power of two rounds nothing.
    const float unit = format == KvFormat::f32 ? 1.0f : fixed_point;
    const Floats factor = splat(score_factor<format>(call, scratch, row) * unit);
    const Floats down = splat(-scratch.block_peaks[row] * unit);
    const auto weight_at = [&](int at) TOKENSPEED_FLAT {
        const Floats power = fma(load_floats(scores + at), factor, down);
        if constexpr (format == KvFormat::f32) return exp2(power);
        return exp2_weight(power);
    };
    const auto seen_at = [&](int at)
                             TOKENSPEED_FLAT { return seen.keep_of(weight_at(at), at, 0.0f); };
    Floats sums = splat(0.0f);
    if constexpr (format == KvFormat::bf16) {
        // Two vectors at a time. Wherever the span begins, a lane has the same positions.
        constexpr int both = 2 * lanes;
        const auto take = [&](int at, Floats first, Floats second) TOKENSPEED_FLAT {
            const Halves halves = to_halves(first, second);
            store(halves, weights + at * V::weight_size_bytes);
            sums = dot(sums, halves, splat_halves(one_and_one));
        };
        for (int at = span.from / both * both; at < span.to; at += both) {
            if (at >= span.from && seen.from <= at && at + both <= seen.to) {
                take(at, weight_at(at), weight_at(at + lanes));
                continue;
            }
            const Floats first = at < span.from ? splat(0.0f) : seen_at(at);
            take(at, first, at + lanes < span.to ? seen_at(at + lanes) : splat(0.0f));
        }
    } else if constexpr (format == KvFormat::i8) {
        const bool whole = seen.from <= span.from && span.whole_to() <= seen.to;
        float top = scratch.value_scale_top;
        if (!whole) {
            Floats tops = splat(0.0f);
            for (int at = span.from; at < span.to; at += lanes) {
                tops = max(seen.keep_of(load_floats(scratch.value_scales + at), at, 0.0f), tops);
            }
            top = largest(tops);
        }
        const Floats inverse = splat(weight_factor(top));
        for (int at = span.from; at < span.to; at += lanes) {
            const Floats p = whole ? weight_at(at) : seen_at(at);
            const Floats part = whole ? load_floats(scratch.value_parts + at)
                                      : mul(load_floats(scratch.value_scales + at), inverse);
            sums = add(sums, p);
            store_shorts(to_ints(mul(p, part)), weights + at * V::weight_size_bytes);
        }
        scratch.weight_scales[row] = top * (1.0f / weight_largest);
    } else {
        for (int at = span.from; at < span.to; at += lanes) {
            const Floats p = seen_at(at);
            sums = add(sums, p);
            store(p, reinterpret_cast<float*>(weights + at * V::weight_size_bytes));
        }
    }
    scratch.block_sums[row] = sum(sums);
}

// Sums of `rows` rows' weights times `vectors` vectors of V, over the positions of a span, whose
// groups stand on the path from `stop` on. Asks for what is ahead as a tile of scores does.
template <KvFormat format, bool asks, int rows, int vectors>
void value_tile(AttentionScratch& scratch, std::int64_t row, const Span& span,
                const std::byte* const* values, std::int64_t first, std::int64_t dim,
                const Path& path, int stop) {
    using V = Values<format>;
    constexpr std::int64_t vector_size_bytes = lanes * V::word_size_bytes;
    constexpr std::int64_t line_vectors = 64 / vector_size_bytes;
    typename V::Sum sums[rows][vectors];
    each_cell<rows, vectors>([&]<int m, int v>(Constant<m>, Constant<v>)
                                 TOKENSPEED_FLAT { clear(sums[m][v]); });
    const std::byte* weights = scratch.weights[row] + span.from * V::weight_size_bytes;
    for (int at = span.from; at < span.to; at += lanes) {
        const std::byte* value_at = values[at / lanes] + first * vector_size_bytes;
        const Stop ahead = *path.ahead<format>(stop);
        if constexpr (asks) path.touch(stop);
        ++stop;
        const int positions = span.to - at < lanes ? span.to - at : lanes;
        const int words = (positions + V::elements - 1) / V::elements;
        for (int word = 0; word < words; ++word) {
            typename V::Vector value[vectors];
            unroll<vectors>([&]<int v>(Constant<v>) TOKENSPEED_FLAT {
                value[v] = V::load(value_at + v * vector_size_bytes);
                if constexpr (asks && v % line_vectors == 0) {
                    const std::int64_t line = (word * (dim / lanes) + first + v) / line_vectors;
                    __builtin_prefetch(ahead.at + line * ahead.step);
                }
            });
            value_at += dim * V::word_size_bytes;
            unroll<rows>([&]<int m>(Constant<m>) TOKENSPEED_FLAT {
                const auto weight = V::splat_word(weights + m * block_positions * 4);
                unroll<vectors>([&]<int v>(Constant<v>) TOKENSPEED_FLAT {
                    V::multiply_add(value[v], weight, sums[m][v]);
                });
            });
            weights += 4;
        }
    }
    each_cell<rows, vectors>([&]<int m, int v>(Constant<m>, Constant<v>) TOKENSPEED_FLAT {
        float* const outputs = scratch.block_outputs[row + m] + (first + v) * lanes;
        if constexpr (format == KvFormat::i8) {
            const Floats scale = splat(scratch.weight_scales[row + m]);
            store(mul(to_floats(sums[m][v]), scale), outputs);
        } else {
            store(sums[m][v], outputs);
        }
    });
}

// Weighted sums of V over the positions of a span.
template <KvFormat format>
void sum_values(const AttentionView<format>& view, AttentionScratch& scratch, const Span& span,
                const Places& places, const Path& path) {
    const std::int64_t dim = view.call.kv.value_dim;
    const int stop = (span.whole_to() - span.from) / lanes;
    for (std::int64_t row = 0; row < view.rows;) {
        const std::int64_t height = tile_height(view.rows - row, value_rows);
        with_count<value_rows>(height, [&]<int rows>(Constant<rows>) {
            for (std::int64_t v = 0; v < dim / lanes; v += value_vectors) {
                const std::int64_t vectors = dim / lanes - v;
                with_count<value_vectors>(
                    vectors < value_vectors ? vectors : value_vectors,
                    [&]<int count_v>(Constant<count_v>) {
                        const auto tile = row == 0 ? value_tile<format, true, rows, count_v>
                                                   : value_tile<format, false, rows, count_v>;
                        tile(scratch, row, span, places.values, v, dim, path, stop);
                    });
            }
        });
        row += height;
    }
}

// Takes one block's result of a row into what the row has of earlier ones.
void merge_block(float& peak, float& total, float* output, float block_peak, float block_total,
                 const float* block_output, std::int64_t dim) {
    const float most = peak > block_peak ? peak : block_peak;
    const float old_part = first(exp2(splat(peak - most)));
    const float new_part = first(exp2(splat(block_peak - most)));
    peak = most;
    total = first(fma(splat(total), splat(old_part), splat(block_total * new_part)));
    for (std::int64_t at = 0; at < dim; at += lanes) {
        const Floats added = mul(load_floats(block_output + at), splat(new_part));
        store(fma(load_floats(output + at), splat(old_part), added), output + at);
    }
}

template <KvFormat format>
void begin_rows(const AttentionView<format>& view, AttentionScratch& scratch) {
    for (std::int64_t row = 0; row < view.rows; ++row) {
        const float* const sinks = view.call.sinks;
        scratch.peaks[row] = sinks ? sinks[view.head_of(row)] * log2_e : nothing_seen;
        scratch.sums[row] = sinks ? 1.0f : 0.0f;
        for (std::int64_t at = 0; at < view.call.kv.value_dim; at += lanes) {
            store(splat(0.0f), scratch.outputs[row] + at);
        }
    }
}

template <KvFormat format>
void end_rows(const AttentionView<format>& view, AttentionScratch& scratch) {
    for (std::int64_t row = 0; row < view.rows; ++row) {
        const float sum = scratch.sums[row];
        const Floats factor = splat(sum > 0.0f ? 1.0f / sum : 0.0f);
        for (std::int64_t at = 0; at < view.call.kv.value_dim; at += lanes) {
            store_part(mul(load_floats(scratch.outputs[row] + at), factor), view.output(row),
                       view.call.y.type, at, lanes);
        }
        if (view.call.log_sums != nullptr) {
            const std::int64_t at =
                (view.first_token + view.token_of(row)) * view.call.heads + view.head_of(row);
            const double peak = static_cast<double>(scratch.peaks[row]) / 1.4426950408889634;
            view.call.log_sums[at] = static_cast<float>(peak + __builtin_log(sum));
        }
    }
}

// Scales of the positions of a span, which is asked for beside those that are read next. What lies
// behind the span may be no number, and counts as 0.
template <KvFormat format>
void load_scales(AttentionScratch& scratch, const Span& span, const Places& places,
                 const Places& next) {
    if constexpr (format == KvFormat::i8) {
        Floats tops = splat(0.0f);
        for (int at = span.from; at < span.to; at += lanes) {
            const int group = at / lanes;
            const auto load = [&](const std::byte* from) {
                const Floats scales = load_floats(reinterpret_cast<const float*>(from));
                return at + lanes <= span.to ? scales : keep(scales, 0, span.to - at, 0.0f);
            };
            __builtin_prefetch(next.key_scales[group]);
            __builtin_prefetch(next.value_scales[group]);
            store(load(places.key_scales[group]), scratch.key_scales + at);
            const Floats value_scales = load(places.value_scales[group]);
            store(value_scales, scratch.value_scales + at);
            tops = max(value_scales, tops);
        }
        scratch.value_scale_top = largest(tops);
        const Floats inverse = splat(weight_factor(scratch.value_scale_top));
        for (int at = span.from; at < span.to; at += lanes) {
            store(mul(load_floats(scratch.value_scales + at), inverse), scratch.value_parts + at);
        }
    }
}

// The path through a span and the one behind.
inline void lay(const Span& span, const Places& places, const Places& next, std::int64_t stride,
                Path& path) {
    int size = 0;
    for (int at = span.from; at < span.to; at += lanes) {
        path.stops[size++] = {places.keys[at / lanes], stride};
    }
    for (int at = span.from; at < span.to; at += lanes) {
        path.stops[size++] = {places.values[at / lanes], 64};
    }
    for (int group = 0; group < groups_touched + block_groups; ++group) {
        path.stops[size++] = {next.keys[group % block_groups], stride};
    }
}

// One block of a partial result: peak, sum, and sums of V.
constexpr std::int64_t partial_floats(std::int64_t value_dim) {
    return value_dim + lanes;
}

template <KvFormat format>
void attend(const Attention& call, const AttentionPart& part, AttentionScratch& scratch) {
    const AttentionView<format> view{call, part};
    const std::int64_t dim = call.kv.value_dim;
    for (std::int64_t row = 0; row < view.rows; ++row) {
        load_query(view, scratch, row);
        scratch.seen[row] = view.seen(row);
    }
    if (part.partials == nullptr) begin_rows(view, scratch);
    // Of all rows, the first position any of them sees, and the end of what the last one sees.
    const Seen all{scratch.seen[0].from, scratch.seen[view.rows - 1].to};
    const auto find = [&](std::int64_t block, Places& places) {
        const std::int64_t end = block + block_positions;
        view.find(block, all.from > block ? all.from : block, all.to < end ? all.to : end, places);
    };
    // Where nothing comes behind, what was read is asked for again.
    Places places{}, next{};
    find(part.block * block_positions, next);
    for (std::int64_t index = part.block; index < part.block_end; ++index) {
        const std::int64_t block = index * block_positions;
        places = next;
        find(block + block_positions, next);
        const auto within = [&](std::int64_t position) {
            const std::int64_t at = position - block;
            return static_cast<int>(at < 0 ? 0 : at > block_positions ? block_positions : at);
        };
        const auto lanes_of = [&](std::int64_t row) {
            const Seen& seen = scratch.seen[row];
            return Lanes{within(seen.from), within(seen.to)};
        };
        const Span span{block, within(all.from) / lanes * lanes, within(all.to)};
        if (span.from < span.to) {
            load_scales<format>(scratch, span, places, next);
            Path path;
            lay(span, places, next, view.keys_stride(), path);
            score_block(view, scratch, span, places, path);
            // One loop after the other, so that no row's weights wait for its peak.
            for (std::int64_t row = 0; row < view.rows; ++row) {
                scratch.block_peaks[row] =
                    find_peak<format>(call, scratch, row, span, lanes_of(row));
            }
            for (std::int64_t row = 0; row < view.rows; ++row) {
                weigh<format>(call, scratch, row, span, lanes_of(row));
            }
            sum_values(view, scratch, span, places, path);
        }
        for (std::int64_t row = 0; row < view.rows; ++row) {
            const Lanes seen = lanes_of(row);
            const bool sees = seen.from < seen.to;
            if (part.partials != nullptr) {
                float* const partial =
                    part.partials + ((index - part.block) * view.rows + row) * partial_floats(dim);
                partial[0] = sees ? scratch.block_peaks[row] : nothing_seen;
                partial[1] = scratch.block_sums[row];
                for (std::int64_t at = 0; sees && at < dim; at += lanes) {
                    store(load_floats(scratch.block_outputs[row] + at), partial + lanes + at);
                }
            } else if (sees) {
                merge_block(scratch.peaks[row], scratch.sums[row], scratch.outputs[row],
                            scratch.block_peaks[row], scratch.block_sums[row],
                            scratch.block_outputs[row], dim);
            }
        }
    }
    if (part.partials == nullptr) end_rows(view, scratch);
}

template <KvFormat format>
void merge(const Attention& call, const AttentionPart& part, AttentionScratch& scratch) {
    const AttentionView<format> view{call, part};
    const std::int64_t dim = call.kv.value_dim;
    begin_rows(view, scratch);
    for (std::int64_t block = part.block; block < part.block_end; ++block) {
        for (std::int64_t row = 0; row < view.rows; ++row) {
            const float* const partial =
                part.partials + ((block - part.block) * view.rows + row) * partial_floats(dim);
            if (partial[0] == nothing_seen) continue;
            merge_block(scratch.peaks[row], scratch.sums[row], scratch.outputs[row], partial[0],
                        partial[1], partial + lanes, dim);
        }
    }
    end_rows(view, scratch);
}

void attend(const Attention& call, const AttentionPart& part, std::byte* scratch) {
    auto& memory = *reinterpret_cast<AttentionScratch*>(scratch);
    switch (call.kv.format) {
        case KvFormat::f32:
            return attend<KvFormat::f32>(call, part, memory);
        case KvFormat::bf16:
            return attend<KvFormat::bf16>(call, part, memory);
        case KvFormat::i8:
            return attend<KvFormat::i8>(call, part, memory);
    }
}

void merge(const Attention& call, const AttentionPart& part, std::byte* scratch) {
    // How pages lie does not matter any more.
    merge<KvFormat::f32>(call, part, *reinterpret_cast<AttentionScratch*>(scratch));
}

}  // namespace
}  // namespace tokenspeed::cpu
