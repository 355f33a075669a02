// What each instruction set's build of the kernels offers: one table of functions a build.
//
// The functions are the inner work of one thread. They take raw pointers that the callers have
// checked, and never fail.
#pragma once

#include <cstddef>
#include <cstdint>

#include "constants.h"
#include "format.h"

namespace tokenspeed::cpu {

enum class Element : std::uint8_t { f32, bf16 };

// A dense matrix of the caller's: rows of `columns` elements, `stride` elements apart.
template <class Pointer>
struct Rows {
    Pointer data;
    Element type;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t stride;

    TOKENSPEED_INLINE std::int64_t element_size_bytes() const {
        return type == Element::f32 ? 4 : 2;
    }
    TOKENSPEED_INLINE Rows first(std::int64_t count) const {
        return {data, type, count, columns, stride};
    }
    TOKENSPEED_INLINE Pointer at(std::int64_t row) const {
        // Through a number, because void may be constant.
        return reinterpret_cast<Pointer>(
            reinterpret_cast<std::uintptr_t>(data) +
            static_cast<std::uintptr_t>(row * stride * element_size_bytes()));
    }
};
using In = Rows<const void*>;
using Out = Rows<void*>;

// What the product needs to know of 32 consecutive inputs of a row beside their integers: their
// scale, scale times sum, and negative sums of all and of the first half.
struct RowStep {
    float scale;
    float scaled_sum;
    std::int32_t negative_sum;
    std::int32_t negative_first_half;
};

// Rows of inputs as signed bytes in [-127, 127], with what belongs to each step of 32 of them.
//
// A product reads some rows at once, so these lie together: groups of `group_rows` rows, the last
// one filled up with zeros. A group has, for each step, the bytes of its rows and then their
// RowSteps, so that it is read from front to back.
struct QuantisedRows {
    std::byte* groups;  // null for rows that are not quantised
    // How many rows lie together follows from how many a call has, which changes from step to step:
    // 0 until that is known.
    std::int64_t group_rows;

    static constexpr std::int64_t row_step_size_bytes = step_inputs + sizeof(RowStep);
    TOKENSPEED_INLINE std::int64_t step_size_bytes() const {
        return group_rows * row_step_size_bytes;
    }
    TOKENSPEED_INLINE std::int64_t group_size_bytes(std::int64_t inputs) const {
        return inputs / step_inputs * step_size_bytes();
    }
    // Where a row has its bytes and its RowStep of the first step; those of each further step lie
    // `step_size_bytes()` on.
    TOKENSPEED_INLINE std::byte* values_at(std::int64_t row, std::int64_t inputs) const {
        return groups + row / group_rows * group_size_bytes(inputs) +
               row % group_rows * step_inputs;
    }
    TOKENSPEED_INLINE std::byte* steps_at(std::int64_t row, std::int64_t inputs) const {
        return groups + row / group_rows * group_size_bytes(inputs) + group_rows * step_inputs +
               row % group_rows * static_cast<std::int64_t>(sizeof(RowStep));
    }
};

// Where an operation writes the rows that it computes in float32: as elements of a type, or, for a
// product with packed weights, quantised.
struct Result {
    Out rows;  // data is null for quantised rows
    QuantisedRows quantised;
};
// What a product reads: the one or the other.
struct Operand {
    In rows;
    QuantisedRows quantised;
};

// stream = x + residual, y = stream / sqrt(mean(stream^2) + epsilon) * weight.
struct AddRmsNorm {
    In x;
    In residual;  // float32; data is null for none
    Out stream;   // float32; data is null where it is not wanted
    const void* weight;
    Element weight_type;
    float epsilon;
    Result y;
};

enum class Activation : std::uint8_t { silu, gelu_tanh, limited };

// y = activation(first half of x) * second half of x. `limited` is g sigmoid(1.702 g) * (u + 1) of
// a gate g that is at most the limit and a u between the limit and its negative.
struct Gated {
    Activation activation;
    In x;
    Result y;
    float limit = 0.0f;
};

// Features that are quantised at once.
constexpr std::int64_t gate_features = lanes * step_inputs;

// Elements i and i + head_dim / 2 of each head turned by the token's angle i.
struct Rotation {
    In x;  // rows of heads
    Out y;
    std::int64_t heads;
    std::int64_t head_dim;
    const float* cosines;  // [tokens, head_dim / 2]
    const float* sines;
};

// y = x W^T + bias.
struct Product {
    const std::byte* weights;
    std::int64_t inputs;  // whole steps
    std::int64_t outputs;
    QuantisedRows x;            // for packed weights; their groups' height for all
    const void* dense;          // [rows, inputs] of their own type, for dense weights
    std::int64_t dense_stride;  // elements from row to row
    const void* bias;           // [outputs] of the type of y, or null
    void* y;                    // [rows, outputs]
    std::int64_t y_stride;
    Element y_type;
    std::int64_t rows;
};

// A part of a product: panels [panel, panel_end) of rows [row, row_end).
struct Part {
    std::int64_t panel, panel_end;
    std::int64_t row, row_end;
};

// How pages hold numbers. i8: each position of a head is rounded to whole numbers in [-127, 127] of
// a scale of its own, K after a Hadamard transform, which spreads what few elements stand out.
enum class KvFormat : std::uint8_t { f32, bf16, i8 };

// A pool of pages: for each page, of each head, K and V of `page_size` positions.
//
// K lies as the products with a query want it: 16 lanes are 16 positions. With `pair` the number of
// elements in 32 bits (2 of bf16, 1 of f32) K of a head in a page is [head_dim / pair, page_size,
// pair], and V, whose lanes are elements, [page_size / pair, value_dim, pair].
//
// Of i8, K is [head_dim / 4, page_size, 4], as unsigned bytes 128 more than what they stand for,
// and V [page_size / 2, value_dim, 2]; behind either stand the positions' scales, float32
// [page_size].
struct KvPages {
    void* k;
    void* v;
    KvFormat format;
    std::int64_t pages;
    std::int64_t page_size;  // a multiple of 16
    std::int64_t heads;
    std::int64_t head_dim;   // of K, a multiple of 16
    std::int64_t value_dim;  // of V, a multiple of 16

    TOKENSPEED_INLINE std::int64_t element_size_bytes() const {
        return format == KvFormat::f32 ? 4 : format == KvFormat::bf16 ? 2 : 1;
    }
    TOKENSPEED_INLINE std::int64_t scale_size_bytes() const {
        return format == KvFormat::i8 ? std::int64_t{sizeof(float)} : 0;
    }
    // Of one head in a page.
    TOKENSPEED_INLINE std::int64_t k_size_bytes() const {
        return page_size * (head_dim * element_size_bytes() + scale_size_bytes());
    }
    TOKENSPEED_INLINE std::int64_t v_size_bytes() const {
        return page_size * (value_dim * element_size_bytes() + scale_size_bytes());
    }
};

// Writes K and V of tokens to their slots (page * page_size + position within the page).
struct KvAppend {
    In k;  // rows of heads
    In v;
    KvPages to;
    const std::int64_t* slots;
    // Taken from K of all positions before it is rounded, [heads, head_dim] of `offset_type`, which
    // shifts all scores of a query alike: softmax does not notice. Null for nothing. Only i8
    // rounds.
    const void* k_offset;
    Element offset_type;
};

// Rows of a step, each a run of tokens of one request.
struct RowTable {
    const std::int32_t* query_starts;  // [rows + 1]
    const std::int32_t* context_lens;  // [rows]
    const std::int32_t* slots;         // [rows]
    const std::int32_t* pages;         // [slots, pages_stride]
    std::int64_t pages_stride;
};

// Positions whose scores are kept at a time. Softmax goes over one block as a whole, and results of
// blocks are put together in their order: so what a token gets does not depend on what is computed
// beside it.
constexpr int block_positions = 256;
constexpr int head_dim_max = 256;

// y = softmax(q k^T * scale) v over the pages of each row, causal.
struct Attention {
    In q;  // rows of heads
    Out y;
    std::int64_t heads;  // of q; each KV head serves heads / kv.heads of them
    KvPages kv;
    RowTable rows;
    float scale;
    float soft_cap;       // scores are soft_cap * tanh(score / soft_cap); 0 for as they are
    std::int64_t window;  // a token sees so many positions, itself among them; 0 for all
    const float* sinks;   // of each head, a score that takes its part of softmax and gives nothing
    // Where pages hold some positions of each row only: of each token, the first and the end of
    // those held that it sees, none of which go down within a row. [tokens, 2]; null for rows whose
    // positions are all there.
    const std::int32_t* seen;
    // Of each token and head, the logarithm of the sum that softmax divides by, -inf where nothing
    // was seen, of which y is 0 then. [tokens, heads]; null where it is not wanted.
    float* log_sums;
};

// A part of one row's attention: some of its tokens, for the query heads of one KV head, over some
// blocks of positions.
struct AttentionPart {
    std::int64_t row;
    std::int64_t kv_head;
    std::int64_t token, token_end;
    std::int64_t block, block_end;
    // Where results of the blocks go, to be merged later; null for a part that has all blocks.
    float* partials;
};

// A pool of latents: for each page one vector of `dim` elements for each position.
struct LatentPages {
    void* data;
    Element type;
    std::int64_t pages;
    std::int64_t page_size;
    std::int64_t dim;  // a multiple of 16
};

constexpr int latent_dim_max = 640;

// Writes latents of tokens to their slots.
struct LatentAppend {
    In latents;
    LatentPages to;
    const std::int64_t* slots;
};

// y = softmax(q c^T * scale) c' over the pages of each row, causal, where c' are the first
// `value_dim` elements of a latent.
struct LatentAttention {
    In q;  // rows of heads, of as many elements as a latent
    Out y;
    std::int64_t heads;
    LatentPages latents;
    std::int64_t value_dim;  // a multiple of 32
    RowTable rows;
    float scale;
};

// A part of one row's attention over latents: [first, end) of its tokens' heads, a token's heads
// one after the other, over some blocks of positions.
struct LatentPart {
    std::int64_t row;
    std::int64_t first, end;
    std::int64_t block, block_end;
    float* partials;  // as an AttentionPart has
};

// The greatest of so many logits stands for them where the likeliest tokens are looked for.
constexpr std::int64_t peak_block = 64;

struct Kernels {
    // Microkernels that do nothing useful, as fast as it goes; `probes.cpp` times them. Each
    // returns a number that depends on all its work, so that none of it can be left out.
    struct Probes {
        // Reads a buffer of a multiple of 4 KiB in four streams.
        std::uint64_t (*read)(const std::byte* data, std::size_t size_bytes);
        // Products of unsigned with signed bytes, bfloat16 products, float32 products: `rounds`
        // rounds of the operations that `*_round` counts (a multiplication and an addition are
        // two).
        std::uint64_t (*int8)(std::int64_t rounds);
        std::uint64_t (*bf16)(std::int64_t rounds);
        std::uint64_t (*f32)(std::int64_t rounds);
        std::int64_t int8_round;
        std::int64_t bf16_round;
        std::int64_t f32_round;
    };

    Probes probes;

    // Quantises one row, of a multiple of 32 elements.
    void (*quantise)(const In& x, std::int64_t row, const QuantisedRows& to);
    // By index in `formats`. `scratch` is the thread's own, of `scratch_size_bytes`.
    void (*multiply[formats.size()])(const Product& product, const Part& part, std::byte* scratch);
    void (*add_rms_norm)(const AddRmsNorm& call, std::int64_t row);
    // Features [from, to) of a row; both multiples of `gate_features`, but for the row's end.
    void (*gate)(const Gated& call, std::int64_t row, std::int64_t from, std::int64_t to);
    void (*rotate)(const Rotation& call, std::int64_t token);
    std::int64_t (*argmax)(const float* logits, std::int64_t count);
    // Of each `peak_block` logits.
    void (*block_peaks)(const float* logits, std::int64_t count, float* peaks);
    // `words` holds a bit for each token; `to` may be `logits`.
    void (*mask_logits)(const float* logits, const std::int32_t* words, std::int64_t count,
                        float* to);
    double (*sum_weights)(const float* logits, std::int64_t count, float peak);
    void (*weigh_logits)(const float* logits, std::int64_t count, float peak, float temperature,
                         float* weights);
    // Tokens [token, end) of so many.
    void (*append)(const KvAppend& call, std::int64_t token, std::int64_t end, std::int64_t tokens);
    void (*attend)(const Attention& call, const AttentionPart& part, std::byte* scratch);
    // Puts together what parts of the same tokens left of blocks [0, blocks), from the first on.
    void (*merge)(const Attention& call, const AttentionPart& part, std::byte* scratch);
    void (*append_latents)(const LatentAppend& call, std::int64_t token, std::int64_t end);
    void (*attend_latent)(const LatentAttention& call, const LatentPart& part, std::byte* scratch);
    void (*merge_latent)(const LatentAttention& call, const LatentPart& part, std::byte* scratch);
    // Heads of tokens that a part of attention over latents may have.
    int latent_rows;
    // Query rows (tokens times query heads) that a part of attention should have.
    int attention_rows;
    // Of up to `streamed_rows_max` rows a part reads its weights as `streams` streams, for up to
    // `few_rows` rows at once; more are cut into groups of `cut_rows`, or of `cut_rows_min` to
    // `cut_rows_max` where fewer rows are added then. Beyond that it unpacks `tile_panels` panels
    // at a time for groups of `tile_rows` rows, and may have `rows_max` rows and `panels_max`
    // panels.
    int streamed_rows_max;
    int streams;
    int few_rows;
    int cut_rows, cut_rows_min, cut_rows_max;
    int tile_panels;
    int tile_rows;
    int rows_max;
    int panels_max;
    std::size_t scratch_size_bytes;
};

#if defined(__x86_64__)
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_avx512_vnni;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2_vnni;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_scalar;

}  // namespace tokenspeed::cpu
