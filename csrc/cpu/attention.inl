// Attention over paged KV, for one token or many.
//
// For one token and one query head:
//
//     for each block of 256 positions, as far as the token sees:
//         s = (q . k) * scale, over pairs of elements in their order
//         m = max s;  p = 2^(s log2(e) - m), rounded to V's type;  l = sum of p
//         o = sum of p v, over pairs of positions in their order
//     M, L, O = the blocks' m, l and o merged from the first to the last;  y = O / L
//
// Positions that a token does not see have p = 0, which changes no sum. So a token's result is the
// same bits whether it is computed alone or among the tokens of a prompt, however that was cut, and
// whichever thread does which blocks.
//
// The query heads of a KV head stand beside each other as rows, and so do tokens: each vector of K
// and V that is read serves all of them. Blocks and softmax: Dao et al. 2022 (FlashAttention);
// blocks of one token on several threads: Dao et al. 2023 (Flash-Decoding).

#include "math.inl"

namespace tokenspeed::cpu {
namespace {

constexpr float nothing_seen = -1e30f;

// How 32 bits of a pool's elements are multiplied.
template <Element type>
struct Words;
template <>
struct Words<Element::f32> {
    static constexpr int pair = 1;
    using Vector = Floats;
    static Vector load(const std::byte* at) {
        return load_floats(reinterpret_cast<const float*>(at));
    }
    static Vector splat_word(const std::byte* at) {
        float word;
        __builtin_memcpy(&word, at, sizeof word);
        return splat(word);
    }
    static Floats multiply_add(Vector a, Vector b, Floats sum) { return fma(a, b, sum); }
    static void store_weights(Floats p, std::byte* at) { store(p, reinterpret_cast<float*>(at)); }
    static Floats load_weights(const std::byte* at) { return load(at); }
};
template <>
struct Words<Element::bf16> {
    static constexpr int pair = 2;
    using Vector = Halves;
    static Vector load(const std::byte* at) { return load_halves(at); }
    static Vector splat_word(const std::byte* at) {
        std::uint32_t word;
        __builtin_memcpy(&word, at, sizeof word);
        return splat_halves(word);
    }
    static Floats multiply_add(Vector a, Vector b, Floats sum) { return dot(sum, a, b); }
    static void store_weights(Floats p, std::byte* at) { store_bf16_normal(p, at); }
    static Floats load_weights(const std::byte* at) { return load_bf16(at); }
};

// Query rows of a part are worked on in the thread's scratch memory.
constexpr int part_rows_max = 48;
constexpr int block_groups = block_positions / lanes;
struct AttentionScratch {
    std::byte queries[part_rows_max][head_dim_max * 4];
    float scores[part_rows_max][block_positions];
    std::byte weights[part_rows_max][block_positions * 4];
    float block_outputs[part_rows_max][head_dim_max];
    float outputs[part_rows_max][head_dim_max];
    float block_peaks[part_rows_max], block_sums[part_rows_max];
    float peaks[part_rows_max], sums[part_rows_max];
};

// Which positions a query row sees: [from, to).
struct Seen {
    std::int64_t from, to;
};

// The part's geometry.
template <Element type>
struct AttentionView {
    static constexpr int pair = Words<type>::pair;
    static constexpr std::int64_t element = 4 / pair;

    const Attention& call;
    const AttentionPart& part;
    std::int64_t group = call.heads / call.kv.heads;
    std::int64_t rows = (part.token_end - part.token) * group;
    std::int64_t first_token = call.rows.query_starts[part.row];
    const std::int32_t* pages =
        call.rows.pages + call.rows.slots[part.row] * call.rows.pages_stride;

    std::int64_t token_of(std::int64_t row) const { return part.token + row / group; }
    Seen seen(std::int64_t row) const {
        const std::int64_t position = call.rows.context_lens[part.row] + token_of(row);
        const std::int64_t from = call.window == 0 ? 0 : position + 1 - call.window;
        return {from > 0 ? from : 0, position + 1};
    }
    std::int64_t head_of(std::int64_t row) const { return part.kv_head * group + row % group; }
    const std::byte* query(std::int64_t row) const {
        return static_cast<const std::byte*>(call.q.at(first_token + token_of(row))) +
               head_of(row) * call.kv.head_dim * element;
    }
    std::byte* output(std::int64_t row) const {
        return static_cast<std::byte*>(call.y.at(first_token + token_of(row))) +
               head_of(row) * call.kv.head_dim * element;
    }
    // Where the part's KV head begins in the page that holds a position.
    const std::byte* page(const void* pool, std::int64_t position) const {
        const std::int64_t page = pages[position / call.kv.page_size];
        return static_cast<const std::byte*>(pool) +
               (page * call.kv.page_elements() + part.kv_head * call.kv.head_elements()) * element;
    }
    // K of 16 positions from a multiple of 16 on: vectors of one pair of elements each, so far
    // apart.
    const std::byte* keys(std::int64_t position) const {
        return page(call.kv.k, position) + position % call.kv.page_size * 4;
    }
    std::int64_t keys_stride() const { return call.kv.page_size * 4; }
    // V from a multiple of 16 on: rows of head_dim words, for one pair of positions each.
    const std::byte* values(std::int64_t position) const {
        return page(call.kv.v, position) +
               position % call.kv.page_size * call.kv.head_dim * element;
    }
};

// How many of the rows left the next tile takes: all tiles get about as many.
TOKENSPEED_INLINE std::int64_t tile_height(std::int64_t left, std::int64_t most) {
    const std::int64_t tiles = (left + most - 1) / most;
    return (left + tiles - 1) / tiles;
}

// Keys are found in pieces of so many vectors, which lie in one page.
constexpr int piece_vectors = score_vectors < 2 ? 1 : 2;
constexpr int tile_pieces = score_vectors / piece_vectors;

// Dot products of `rows` queries with `vectors` times 16 keys. Asks for what is `ahead` of each
// piece of them meanwhile, because CPUs do not look beyond a page of memory by themselves.
template <Element type, int rows, int vectors>
void score_tile(const std::byte* queries, const std::byte* const* keys, std::int64_t stride,
                std::int64_t words, const std::int64_t* ahead, float* scores) {
    using W = Words<type>;
    Floats sums[rows][vectors];
    for (auto& of_row : sums) {
        for (Floats& sum : of_row) sum = splat(0.0f);
    }
    for (std::int64_t word = 0; word < words; ++word) {
        typename W::Vector k[vectors];
        for (int v = 0; v < vectors; ++v) {
            k[v] = W::load(keys[v] + word * stride);
            __builtin_prefetch(keys[v] + word * stride + ahead[v / piece_vectors]);
        }
        for (int row = 0; row < rows; ++row) {
            const auto q = W::splat_word(queries + row * head_dim_max * 4 + word * 4);
            for (int v = 0; v < vectors; ++v) {
                sums[row][v] = W::multiply_add(q, k[v], sums[row][v]);
            }
        }
    }
    for (int row = 0; row < rows; ++row) {
        for (int v = 0; v < vectors; ++v) {
            store(sums[row][v], scores + row * block_positions + v * lanes);
        }
    }
}

// Positions [from, to) of a block that starts at `block`; `from` is a multiple of 16 from there.
struct Span {
    std::int64_t block;
    int from, to;

    // `to` as a whole number of vectors.
    TOKENSPEED_INLINE int whole_to() const { return (to + lanes - 1) / lanes * lanes; }
};

// Where K and V of a span lie, in the order in which they are read, and K of what comes behind.
// Memory answers after the time in which some of these pieces are read.
constexpr int pieces_ahead = 3;
constexpr int piece_positions = piece_vectors * lanes;
// A page has at least 16 positions, and a block may begin and end within one.
constexpr int value_runs_max = block_groups + 1;
struct Path {
    const std::byte* at[block_groups + value_runs_max + pieces_ahead];
    // Of each run of V: its pairs of positions.
    std::int64_t words[value_runs_max];
    int key_pieces = 0, value_runs = 0;
};

template <Element type>
Path find_path(const AttentionView<type>& view, const Span& span, std::int64_t end) {
    Path path;
    int size = 0;
    for (int at = span.from; at < span.to; at += piece_positions) {
        path.at[size++] = view.keys(span.block + at);
        ++path.key_pieces;
    }
    const std::int64_t page_size = view.call.kv.page_size;
    for (std::int64_t at = span.from; at < span.to; ++path.value_runs) {
        const std::int64_t page_left = page_size - (span.block + at) % page_size;
        const std::int64_t positions = span.to - at < page_left ? span.to - at : page_left;
        path.words[path.value_runs] = (positions + Words<type>::pair - 1) / Words<type>::pair;
        path.at[size++] = view.values(span.block + at);
        at += positions;
    }
    for (int piece = 0; piece < pieces_ahead; ++piece) {
        const std::int64_t position = span.block + block_positions + piece * piece_positions;
        path.at[size + piece] = position < end ? view.keys(position) : path.at[size - 1];
    }
    return path;
}

// Scores of all rows with the positions of a span.
template <Element type>
void score_block(const AttentionView<type>& view, AttentionScratch& scratch, const Span& span,
                 const Path& path) {
    const std::int64_t words = view.call.kv.head_dim / Words<type>::pair;
    const std::int64_t page_size = view.call.kv.page_size;
    for (int index = 0; index < path.key_pieces; index += tile_pieces) {
        const int at = span.from + index * piece_positions;
        const int left = (span.whole_to() - at) / lanes;
        const std::byte* keys[score_vectors] = {path.at[index]};
        std::int64_t ahead[tile_pieces] = {};
        for (int v = 0; v < score_vectors && v < left; ++v) {
            const int piece = index + v / piece_vectors;
            const std::int64_t position = span.block + at + v * lanes;
            keys[v] = v % piece_vectors == 0      ? path.at[piece]
                      : position % page_size == 0 ? view.keys(position)
                                                  : keys[v - 1] + lanes * 4;
            ahead[v / piece_vectors] = path.at[piece + pieces_ahead] - path.at[piece];
        }
        for (std::int64_t row = 0; row < view.rows;) {
            const std::int64_t height = tile_height(view.rows - row, score_rows);
            with_count<score_rows>(height, [&]<int rows>(Constant<rows>) {
                with_count<score_vectors>(left < score_vectors ? left : score_vectors,
                                          [&]<int vectors>(Constant<vectors>) {
                                              score_tile<type, rows, vectors>(
                                                  scratch.queries[row], keys, view.keys_stride(),
                                                  words, ahead, scratch.scores[row] + at);
                                          });
            });
            row += height;
        }
    }
}

// Weights of a row over lanes [from, to) of the block, of which it sees [seen_from, seen_to).
template <Element type>
void weigh(const Attention& call, AttentionScratch& scratch, std::int64_t row, int from, int to,
           Seen seen) {
    const int seen_from = static_cast<int>(seen.from), seen_to = static_cast<int>(seen.to);
    float* const scores = scratch.scores[row];
    std::byte* const weights = scratch.weights[row];
    const Floats factor = splat(call.soft_cap == 0.0f ? call.scale * log2_e : call.scale);
    const auto load = [&](int at) {
        Floats score = mul(load_floats(scores + at), factor);
        if (call.soft_cap != 0.0f) {
            const Floats curve = tanh(div(score, splat(call.soft_cap)));
            score = mul(curve, splat(call.soft_cap * log2_e));
        }
        if (at >= seen_from && at + lanes <= seen_to) return score;
        const auto within = [&](int position) {
            const int lane = position - at;
            return lane < 0 ? 0 : lane > lanes ? lanes : lane;
        };
        return keep(score, within(seen_from), within(seen_to), nothing_seen);
    };
    Floats most = splat(nothing_seen);
    for (int at = from; at < to; at += lanes) {
        const Floats score = load(at);
        store(score, scores + at);
        most = max(score, most);
    }
    const float peak = largest(most);
    Floats sums = splat(0.0f);
    const Floats peaks = splat(peak);
    for (int at = from; at < to; at += lanes) {
        std::byte* const to_weights = weights + at * (4 / Words<type>::pair);
        Words<type>::store_weights(exp2(sub(load_floats(scores + at), peaks)), to_weights);
        sums = add(sums, Words<type>::load_weights(to_weights));
    }
    scratch.block_peaks[row] = peak;
    scratch.block_sums[row] = sum(sums);
}

// Sums of `rows` rows' weights times `vectors` vectors of V, over the positions of a path.
template <Element type, int rows, int vectors>
void value_tile(const std::byte* weights, const Path& path, std::int64_t offset,
                std::int64_t stride, float* outputs) {
    using W = Words<type>;
    Floats sums[rows][vectors];
    for (auto& of_row : sums) {
        for (Floats& sum : of_row) sum = splat(0.0f);
    }
    for (int index = 0; index < path.value_runs; ++index) {
        const std::byte* const* piece = path.at + path.key_pieces + index;
        const std::byte* values = piece[0] + offset;
        const std::int64_t ahead = piece[pieces_ahead] - piece[0];
        for (std::int64_t word = 0; word < path.words[index]; ++word) {
            typename W::Vector value[vectors];
            for (int v = 0; v < vectors; ++v) {
                value[v] = W::load(values + v * lanes * 4);
                __builtin_prefetch(values + v * lanes * 4 + ahead);
            }
            values += stride;
            for (int row = 0; row < rows; ++row) {
                const auto weight = W::splat_word(weights + row * block_positions * 4);
                for (int v = 0; v < vectors; ++v) {
                    sums[row][v] = W::multiply_add(weight, value[v], sums[row][v]);
                }
            }
            weights += 4;
        }
    }
    for (int row = 0; row < rows; ++row) {
        for (int v = 0; v < vectors; ++v) {
            store(sums[row][v], outputs + row * head_dim_max + v * lanes);
        }
    }
}

// Weighted sums of V over the positions of a span.
template <Element type>
void sum_values(const AttentionView<type>& view, AttentionScratch& scratch, const Span& span,
                const Path& path) {
    const std::int64_t dim = view.call.kv.head_dim;
    for (std::int64_t row = 0; row < view.rows;) {
        const std::int64_t height = tile_height(view.rows - row, value_rows);
        const std::byte* weights = scratch.weights[row] + span.from * (4 / Words<type>::pair);
        const auto tile = [&]<int rows>(Constant<rows>) {
            for (std::int64_t v = 0; v < dim / lanes; v += value_vectors) {
                float* outputs = scratch.block_outputs[row] + v * lanes;
                const std::int64_t vectors = dim / lanes - v;
                with_count<value_vectors>(vectors < value_vectors ? vectors : value_vectors,
                                          [&]<int count_v>(Constant<count_v>) {
                                              value_tile<type, rows, count_v>(
                                                  weights, path, v * lanes * 4, dim * 4, outputs);
                                          });
            }
        };
        with_count<value_rows>(height, tile);
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

template <Element type>
void begin_rows(const AttentionView<type>& view, AttentionScratch& scratch) {
    for (std::int64_t row = 0; row < view.rows; ++row) {
        scratch.peaks[row] = nothing_seen;
        scratch.sums[row] = 0.0f;
        for (std::int64_t at = 0; at < view.call.kv.head_dim; at += lanes) {
            store(splat(0.0f), scratch.outputs[row] + at);
        }
    }
}

template <Element type>
void end_rows(const AttentionView<type>& view, AttentionScratch& scratch) {
    for (std::int64_t row = 0; row < view.rows; ++row) {
        const Floats factor = splat(1.0f / scratch.sums[row]);
        for (std::int64_t at = 0; at < view.call.kv.head_dim; at += lanes) {
            store_part(mul(load_floats(scratch.outputs[row] + at), factor), view.output(row), type,
                       at, lanes);
        }
    }
}

// One block of a partial result: peak, sum, and sums of V.
constexpr std::int64_t partial_floats(std::int64_t head_dim) {
    return head_dim + lanes;
}

template <Element type>
void attend(const Attention& call, const AttentionPart& part, AttentionScratch& scratch) {
    const AttentionView<type> view{call, part};
    const std::int64_t dim = call.kv.head_dim;
    for (std::int64_t row = 0; row < view.rows; ++row) {
        __builtin_memcpy(scratch.queries[row], view.query(row),
                         static_cast<std::size_t>(dim * view.element));
    }
    if (part.partials == nullptr) begin_rows(view, scratch);
    // Of all rows, the first position any of them sees, and the end of what the last one sees.
    const Seen all{view.seen(0).from, view.seen(view.rows - 1).to};
    for (std::int64_t index = part.block; index < part.block_end; ++index) {
        const std::int64_t block = index * block_positions;
        const auto within = [&](std::int64_t position) {
            const std::int64_t at = position - block;
            return at < 0 ? 0 : at > block_positions ? std::int64_t{block_positions} : at;
        };
        const Span span{block, static_cast<int>(within(all.from) / lanes * lanes),
                        static_cast<int>(within(all.to))};
        if (span.from < span.to) {
            const std::int64_t end = part.block_end * block_positions;
            const Path path = find_path(view, span, end < all.to ? end : all.to);
            score_block(view, scratch, span, path);
            for (std::int64_t row = 0; row < view.rows; ++row) {
                const Seen seen = view.seen(row);
                weigh<type>(call, scratch, row, span.from, span.whole_to(),
                            {within(seen.from), within(seen.to)});
            }
            sum_values(view, scratch, span, path);
        }
        for (std::int64_t row = 0; row < view.rows; ++row) {
            const Seen seen = view.seen(row);
            const bool sees = within(seen.from) < within(seen.to);
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

template <Element type>
void merge(const Attention& call, const AttentionPart& part, AttentionScratch& scratch) {
    const AttentionView<type> view{call, part};
    const std::int64_t dim = call.kv.head_dim;
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
    if (call.kv.type == Element::f32) {
        attend<Element::f32>(call, part, memory);
    } else {
        attend<Element::bf16>(call, part, memory);
    }
}

void merge(const Attention& call, const AttentionPart& part, std::byte* scratch) {
    auto& memory = *reinterpret_cast<AttentionScratch*>(scratch);
    if (call.kv.type == Element::f32) {
        merge<Element::f32>(call, part, memory);
    } else {
        merge<Element::bf16>(call, part, memory);
    }
}

// Writes K and V of tokens [token, end). Behind the last token of a row V's other half of the pair
// is zeroed: attention multiplies it by 0, and what was there before may be no number.
template <Element type>
void append(const KvAppend& call, std::int64_t token, std::int64_t end, std::int64_t tokens) {
    constexpr int pair = Words<type>::pair;
    constexpr std::int64_t element = 4 / pair;
    const KvPages& to = call.to;
    auto* const k_pool = static_cast<std::byte*>(to.k);
    auto* const v_pool = static_cast<std::byte*>(to.v);
    for (; token < end; ++token) {
        const std::int64_t slot = call.slots[token];
        const std::int64_t position = slot % to.page_size;
        const std::int64_t base = slot / to.page_size * to.page_elements();
        const auto* k = static_cast<const std::byte*>(call.k.at(token));
        const auto* v = static_cast<const std::byte*>(call.v.at(token));
        const bool last = token + 1 == tokens || call.slots[token + 1] != slot + 1;
        // The two of a pair are written together by whoever has the first of them.
        const bool joined = pair == 2 && position % 2 == 0 && !last;
        const bool done =
            pair == 2 && position % 2 == 1 && token > 0 && call.slots[token - 1] == slot - 1;
        const auto* second = joined ? static_cast<const std::byte*>(call.v.at(token + 1)) : nullptr;
        for (std::int64_t head = 0; head < to.heads; ++head) {
            std::byte* const page_k = k_pool + (base + head * to.head_elements()) * element;
            std::byte* const page_v = v_pool + (base + head * to.head_elements()) * element;
            const std::int64_t first = head * to.head_dim;
            for (std::int64_t at = 0; at < to.head_dim; at += pair) {
                __builtin_memcpy(page_k + (at / pair * to.page_size + position) * 4,
                                 k + (first + at) * element, 4);
            }
            std::byte* const row_v = page_v + position / pair * to.head_dim * 4;
            if constexpr (pair == 1) {
                __builtin_memcpy(row_v, v + first * element,
                                 static_cast<std::size_t>(to.head_dim * element));
            } else if (!done) {
                const auto half = [&](const std::byte* row, std::int64_t at) {
                    std::uint16_t bits;
                    __builtin_memcpy(&bits, row + (first + at) * element, sizeof bits);
                    return std::uint32_t{bits};
                };
                for (std::int64_t at = 0; at < to.head_dim; ++at) {
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
}

void append(const KvAppend& call, std::int64_t token, std::int64_t end, std::int64_t tokens) {
    if (call.to.type == Element::f32) {
        append<Element::f32>(call, token, end, tokens);
    } else {
        append<Element::bf16>(call, token, end, tokens);
    }
}

}  // namespace
}  // namespace tokenspeed::cpu
