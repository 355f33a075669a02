// Attention over paged latents, where K and V of a position are one vector for all heads
// (DeepSeek-V2, 2024, section 2.1), with queries that were multiplied by the up-projection of K.
//
// Every query head of every token is a row, and 16 rows are the lanes of a vector: a row is one
// product of its query with each latent, whatever stands beside it. For one row:
//
//     for each block of 256 positions, as far as the row sees:
//         s = (q . c) * scale, over words of elements in their order
//         m = max s;  p = 2^(s log2(e) - m), rounded to the latents' type;  l = sum of p in order
//         o = sum of p c, over words of positions in their order, of c's first elements
//     M, L, O = the blocks' m, l and o merged from the first to the last;  y = O / L
//
// Positions that a row does not see have p = 0, which changes no sum. So the bits of a row do not
// depend on batch, cut or threads. A latent is read once for as many rows as fit the registers: at
// 16 heads a byte of it is worth some 60 operations, so that arithmetic is the limit, not memory.

#pragma once

#include "attention.inl"

namespace tokenspeed::cpu {
namespace {

// Rows of a part, in vectors; and positions whose scores are computed at a time.
constexpr int latent_vectors = 2;
constexpr int latent_rows_max = latent_vectors * lanes;
constexpr int latent_positions = score_rows * score_vectors < 2 * latent_vectors
                                     ? 1
                                     : score_rows * score_vectors / latent_vectors;

struct LatentScratch {
    // Words of the queries, of all rows beside each other.
    std::byte queries[latent_dim_max][latent_rows_max * 4];
    float scores[block_positions][latent_rows_max];
    // Words of weights of as many positions as a word has, of all rows beside each other.
    std::byte weights[block_positions][latent_rows_max * 4];
    float block_outputs[latent_rows_max][latent_dim_max];
    float outputs[latent_rows_max][latent_dim_max];
    float block_peaks[latent_rows_max], block_sums[latent_rows_max];
    float peaks[latent_rows_max], sums[latent_rows_max];
    // Where each position of the block lies.
    const std::byte* latents[block_positions];
};

// The part's geometry.
template <KvFormat format>
struct LatentView {
    static constexpr std::int64_t element = 4 / Keys<format>::elements;

    const LatentAttention& call;
    const LatentPart& part;
    std::int64_t rows = part.end - part.first;
    std::int64_t vectors = (rows + lanes - 1) / lanes;
    std::int64_t first_token = call.rows.query_starts[part.row];
    const std::int32_t* pages =
        call.rows.pages + call.rows.slots[part.row] * call.rows.pages_stride;

    std::int64_t token_of(std::int64_t row) const { return (part.first + row) / call.heads; }
    std::int64_t head_of(std::int64_t row) const { return (part.first + row) % call.heads; }
    // The end of what a row sees.
    std::int64_t seen(std::int64_t row) const {
        return call.rows.context_lens[part.row] + token_of(row) + 1;
    }
    std::byte* output(std::int64_t row) const {
        return static_cast<std::byte*>(call.y.at(first_token + token_of(row))) +
               head_of(row) * call.value_dim * call.y.element_size_bytes();
    }
    // Positions [0, count) of the block.
    void find(std::int64_t block, std::int64_t count, const std::byte** latents) const {
        const std::int64_t size_bytes = call.latents.dim * element;
        for (std::int64_t at = 0; at < count;) {
            const std::int64_t position = block + at, within = position % call.latents.page_size;
            const std::byte* from =
                static_cast<const std::byte*>(call.latents.data) +
                (pages[position / call.latents.page_size] * call.latents.page_size + within) *
                    size_bytes;
            for (std::int64_t next = within; next < call.latents.page_size && at < count; ++next) {
                latents[at++] = from;
                from += size_bytes;
            }
        }
    }
};

// Takes the rows' queries to the scratch memory, word by word; what fills up the last vector is 0.
template <KvFormat format>
void load_queries(const LatentView<format>& view, LatentScratch& scratch) {
    const std::int64_t dim = view.call.latents.dim;
    alignas(64) std::byte memory[latent_dim_max * 4];
    for (std::int64_t row = 0; row < view.vectors * lanes; ++row) {
        const std::byte* query = memory;
        if (row < view.rows) {
            query = head_of<format>(view.call.q, view.first_token + view.token_of(row),
                                    view.head_of(row), dim, memory);
        } else {
            for (std::byte& byte : memory) byte = std::byte{0};
        }
        for (std::int64_t word = 0; word < dim * view.element / 4; ++word) {
            __builtin_memcpy(scratch.queries[word] + row * 4, query + word * 4, 4);
        }
    }
}

// Products of `vectors` times 16 rows with `positions` latents.
template <KvFormat format, int vectors, int positions>
void latent_score_tile(LatentScratch& scratch, int at, std::int64_t words) {
    using K = Keys<format>;
    typename K::Sum sums[positions][vectors];
    each_cell<positions, vectors>([&]<int m, int v>(Constant<m>, Constant<v>)
                                      TOKENSPEED_FLAT { clear(sums[m][v]); });
    const std::byte* latents[positions];
    for (int m = 0; m < positions; ++m) latents[m] = scratch.latents[at + m];
    for (std::int64_t word = 0; word < words; ++word) {
        typename K::Vector queries[vectors];
        unroll<vectors>([&]<int v>(Constant<v>) TOKENSPEED_FLAT {
            queries[v] = K::load(scratch.queries[word] + v * 64);
        });
        unroll<positions>([&]<int m>(Constant<m>) TOKENSPEED_FLAT {
            const auto latent = K::splat_word(latents[m] + word * 4);
            unroll<vectors>([&]<int v>(Constant<v>) TOKENSPEED_FLAT {
                K::multiply_add(latent, queries[v], sums[m][v]);
            });
        });
    }
    each_cell<positions, vectors>([&]<int m, int v>(Constant<m>, Constant<v>) TOKENSPEED_FLAT {
        store(sums[m][v], scratch.scores[at + m] + v * lanes);
    });
}

// Weights of the rows of a vector for the positions [0, count) of a block, of which row `row +
// lane` sees as many as `seen` says; and of those behind up to a whole word, which get 0.
template <KvFormat format>
void latent_weigh(float scale, LatentScratch& scratch, std::int64_t row, int count,
                  const std::int64_t (&seen)[lanes]) {
    using V = Values<format>;
    const int words = (count + V::elements - 1) / V::elements;
    bool all = words * V::elements == count;
    for (const std::int64_t end : seen) all = all && end >= count;
    for (int at = 0; !all && at < words * V::elements; ++at) {
        for (int lane = 0; lane < lanes; ++lane) {
            if (at >= seen[lane]) scratch.scores[at][row + lane] = nothing_seen;
        }
    }
    Floats peaks = splat(nothing_seen);
    const Floats factor = splat(scale * log2_e);
    for (int at = 0; at < count; ++at) {
        float* const scores = scratch.scores[at] + row;
        // Far below what a score can be, so that a factor leaves it there.
        const Floats score = mul(load_floats(scores), factor);
        store(score, scores);
        peaks = max(score, peaks);
    }
    store(peaks, scratch.block_peaks + row);
    Floats sums = splat(0.0f);
    alignas(64) std::byte half[V::elements][lanes * 4];
    for (int word = 0; word < words; ++word) {
        for (int e = 0; e < V::elements; ++e) {
            const int at = word * V::elements + e;
            const Floats p =
                at < count ? exp2(sub(load_floats(scratch.scores[at] + row), peaks)) : splat(0.0f);
            V::store_weights(p, half[e]);
            sums = add(sums, V::load_weights(half[e]));
        }
        std::byte* const to = scratch.weights[word] + row * 4;
        for (int lane = 0; lane < lanes; ++lane) {
            for (int e = 0; e < V::elements; ++e) {
                __builtin_memcpy(to + lane * 4 + e * V::weight_size_bytes,
                                 half[e] + lane * V::weight_size_bytes, V::weight_size_bytes);
            }
        }
    }
    store(sums, scratch.block_sums + row);
}

// Vectors of V that stand for as many elements: of a pair of positions the lower and the upper
// halves of each four words of both, so that their elements come in another order
// (`latent_element`).
template <KvFormat format>
constexpr int latent_group = Values<format>::elements;

// The element of a run of latent_group vectors that a lane of one of them stands for.
template <KvFormat format>
constexpr int latent_element(int vector, int lane) {
    return latent_group<format> == 1 ? lane : lane / 4 * 8 + vector * 4 + lane % 4;
}

// Sums of `rows` rows' weights times `groups` groups of vectors of the first elements of latents.
template <KvFormat format, int rows, int groups>
void latent_value_tile(LatentScratch& scratch, std::int64_t row, std::int64_t group, int count) {
    using V = Values<format>;
    constexpr int vectors = groups * latent_group<format>;
    typename V::Sum sums[rows][vectors];
    each_cell<rows, vectors>([&]<int m, int v>(Constant<m>, Constant<v>)
                                 TOKENSPEED_FLAT { clear(sums[m][v]); });
    const int words = (count + V::elements - 1) / V::elements;
    for (int word = 0; word < words; ++word) {
        typename V::Vector values[vectors];
        const int at = word * V::elements;
        const std::byte* first = scratch.latents[at] + group * 64;
        // Behind the last position its own latent stands in, with a weight of 0.
        const std::byte* second =
            scratch.latents[at + 1 < count ? at + V::elements - 1 : at] + group * 64;
        unroll<groups>([&]<int g>(Constant<g>) TOKENSPEED_FLAT {
            if constexpr (latent_group<format> == 1) {
                values[g] = V::load(first + g * 64);
            } else {
                const auto a = V::load(first + g * 64), b = V::load(second + g * 64);
                values[2 * g] = interleave_low(a, b);
                values[2 * g + 1] = interleave_high(a, b);
            }
        });
        unroll<rows>([&]<int m>(Constant<m>) TOKENSPEED_FLAT {
            const auto weight = V::splat_word(scratch.weights[word] + (row + m) * 4);
            unroll<vectors>([&]<int v>(Constant<v>) TOKENSPEED_FLAT {
                V::multiply_add(values[v], weight, sums[m][v]);
            });
        });
    }
    each_cell<rows, vectors>([&]<int m, int v>(Constant<m>, Constant<v>) TOKENSPEED_FLAT {
        store(sums[m][v],
              scratch.block_outputs[row + m] + (group * latent_group<format> + v) * lanes);
    });
}

// One block of the rows: peaks, sums and sums of V.
template <KvFormat format>
void latent_block(const LatentView<format>& view, LatentScratch& scratch, std::int64_t block,
                  int count) {
    const std::int64_t words = view.call.latents.dim * view.element / 4;
    view.find(block, count, scratch.latents);
    for (int at = 0; at < count;) {
        const auto positions = static_cast<int>(tile_height(count - at, latent_positions));
        with_count<latent_positions>(positions, [&]<int m>(Constant<m>) {
            with_count<latent_vectors>(view.vectors, [&]<int v>(Constant<v>) {
                latent_score_tile<format, v, m>(scratch, at, words);
            });
        });
        at += positions;
    }
    for (std::int64_t row = 0; row < view.vectors * lanes; row += lanes) {
        std::int64_t seen[lanes];
        for (int lane = 0; lane < lanes; ++lane) {
            const std::int64_t last = view.rows - 1;
            const std::int64_t end = view.seen(row + lane < last ? row + lane : last) - block;
            seen[lane] = end < 0 ? 0 : end;
        }
        latent_weigh<format>(view.call.scale, scratch, row, count, seen);
    }
    constexpr int group_max =
        value_vectors / latent_group<format> < 1 ? 1 : value_vectors / latent_group<format>;
    const std::int64_t groups = view.call.value_dim / (lanes * latent_group<format>);
    for (std::int64_t row = 0; row < view.rows;) {
        const std::int64_t height = tile_height(view.rows - row, value_rows);
        with_count<value_rows>(height, [&]<int m>(Constant<m>) {
            for (std::int64_t group = 0; group < groups;) {
                const std::int64_t left = groups - group;
                const std::int64_t wide = left < group_max ? left : group_max;
                with_count<group_max>(wide, [&]<int g>(Constant<g>) {
                    latent_value_tile<format, m, g>(scratch, row, group, count);
                });
                group += wide;
            }
        });
        row += height;
    }
}

template <KvFormat format>
void begin_latent(const LatentView<format>& view, LatentScratch& scratch) {
    for (std::int64_t row = 0; row < view.rows; ++row) {
        scratch.peaks[row] = nothing_seen;
        scratch.sums[row] = 0.0f;
        for (std::int64_t at = 0; at < view.call.value_dim; at += lanes) {
            store(splat(0.0f), scratch.outputs[row] + at);
        }
    }
}

template <KvFormat format>
void end_latent(const LatentView<format>& view, LatentScratch& scratch) {
    constexpr int group = latent_group<format> * lanes;
    for (std::int64_t row = 0; row < view.rows; ++row) {
        const Floats factor = splat(1.0f / scratch.sums[row]);
        for (std::int64_t at = 0; at < view.call.value_dim; at += group) {
            alignas(64) float ordered[group];
            for (int v = 0; v < latent_group<format>; ++v) {
                for (int lane = 0; lane < lanes; ++lane) {
                    ordered[latent_element<format>(v, lane)] =
                        scratch.outputs[row][at + v * lanes + lane];
                }
            }
            for (int v = 0; v < group; v += lanes) {
                store_part(mul(load_floats(ordered + v), factor), view.output(row),
                           view.call.y.type, at + v, lanes);
            }
        }
    }
}

template <KvFormat format>
void attend_latent(const LatentAttention& call, const LatentPart& part, LatentScratch& scratch) {
    const LatentView<format> view{call, part};
    const std::int64_t dim = call.value_dim;
    load_queries(view, scratch);
    if (part.partials == nullptr) begin_latent(view, scratch);
    const std::int64_t end = view.seen(view.rows - 1);
    for (std::int64_t index = part.block; index < part.block_end; ++index) {
        const std::int64_t block = index * block_positions;
        const std::int64_t left = end - block;
        const int count = left < block_positions ? static_cast<int>(left) : block_positions;
        if (count > 0) latent_block(view, scratch, block, count);
        for (std::int64_t row = 0; row < view.rows; ++row) {
            const bool sees = block < view.seen(row);
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
    if (part.partials == nullptr) end_latent(view, scratch);
}

template <KvFormat format>
void merge_latent(const LatentAttention& call, const LatentPart& part, LatentScratch& scratch) {
    const LatentView<format> view{call, part};
    const std::int64_t dim = call.value_dim;
    begin_latent(view, scratch);
    for (std::int64_t block = part.block; block < part.block_end; ++block) {
        for (std::int64_t row = 0; row < view.rows; ++row) {
            const float* const partial =
                part.partials + ((block - part.block) * view.rows + row) * partial_floats(dim);
            if (partial[0] == nothing_seen) continue;
            merge_block(scratch.peaks[row], scratch.sums[row], scratch.outputs[row], partial[0],
                        partial[1], partial + lanes, dim);
        }
    }
    end_latent(view, scratch);
}

// Writes latents of tokens [token, end).
void append_latents(const LatentAppend& call, std::int64_t token, std::int64_t end) {
    const LatentPages& to = call.to;
    const std::int64_t size_bytes = to.dim * (to.type == Element::f32 ? 4 : 2);
    alignas(64) std::byte memory[latent_dim_max * 4];
    for (; token < end; ++token) {
        const std::byte* from =
            to.type == Element::f32
                ? head_of<KvFormat::f32>(call.latents, token, 0, to.dim, memory)
                : head_of<KvFormat::bf16>(call.latents, token, 0, to.dim, memory);
        __builtin_memcpy(static_cast<std::byte*>(to.data) + call.slots[token] * size_bytes, from,
                         static_cast<std::size_t>(size_bytes));
    }
}

void attend_latent(const LatentAttention& call, const LatentPart& part, std::byte* scratch) {
    auto& memory = *reinterpret_cast<LatentScratch*>(scratch);
    if (call.latents.type == Element::f32) {
        attend_latent<KvFormat::f32>(call, part, memory);
    } else {
        attend_latent<KvFormat::bf16>(call, part, memory);
    }
}

void merge_latent(const LatentAttention& call, const LatentPart& part, std::byte* scratch) {
    auto& memory = *reinterpret_cast<LatentScratch*>(scratch);
    if (call.latents.type == Element::f32) {
        merge_latent<KvFormat::f32>(call, part, memory);
    } else {
        merge_latent<KvFormat::bf16>(call, part, memory);
    }
}

}  // namespace
}  // namespace tokenspeed::cpu
