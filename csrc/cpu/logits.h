// One row of float32 logits, on the calling thread: which tokens are the likeliest, a draw, and the
// edits that come before it. Of two tokens the likelier is the one with the greater logit, and on
// equal logits the one with the lower id. NaN counts as minus infinity, and plus infinity as the
// greatest finite number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels.h"

namespace tokenspeed::cpu {

// Memory of `row_room` numbers each.
struct RowMemory {
    float* weights;
    float* spare;
    std::int32_t* ids;
};
inline constexpr std::int64_t row_arrays = 3;

// The vocabulary in whole lines, and one more.
constexpr std::int64_t row_room(std::int64_t count) {
    return (count / peak_block + 2) * peak_block;
}

// The logit as it counts.
float capped(float logit);

// Leaves the `k` likeliest tokens in `ids` in no order; all where there are no more.
// Returns their number.
std::int64_t keep_likeliest(const Kernels& kernels, const float* logits, std::int64_t count,
                            std::int64_t k, const RowMemory& memory);

struct DrawSettings {
    double uniform;      // within (0, 1)
    double temperature;  // above 0
    std::int64_t top_k;  // at least 1; the vocabulary or more keeps all
    double top_p;        // 1 keeps all
    double min_p;        // 0 keeps all
};

// A token of what is left; `likeliest`, which is the row's likeliest one, where none is possible.
std::int64_t draw_token(const Kernels& kernels, const float* logits, std::int64_t count,
                        std::int64_t likeliest, const DrawSettings& settings,
                        const RowMemory& memory);

// What makes log-probabilities of logits.
struct Softmax {
    double peak;
    double log_mass;

    // Never below the least finite number, which every format can carry.
    float log_probability(float logit) const;
};
Softmax softmax_of(const Kernels& kernels, const float* logits, std::int64_t count);

// The `k` likeliest tokens, the likeliest first, and their log-probabilities.
template <class Id>
void report_likeliest(const Kernels& kernels, const float* logits, std::int64_t count,
                      std::int64_t k, const Softmax& softmax, const RowMemory& memory, Id* ids,
                      float* values);

// Ids below the vocabulary, each at most once.
struct Biases {
    std::span<const std::int64_t> ids;
    std::span<const float> values;
};
void add_bias(float* logits, const Biases& biases);

// First the repetition penalty divides positive and multiplies negative logits; then tokens that
// occur in the output lose `presence` once and `frequency` for each occurrence.
struct Penalties {
    float repetition;
    float presence;
    float frequency;

    float apply(float logit, std::int32_t output_count) const;
};

}  // namespace tokenspeed::cpu
