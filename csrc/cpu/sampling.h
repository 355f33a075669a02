// Tokens from logits, on all threads of a runtime; what counts as likely is said in `logits.h`.
// All throw KernelError for logits of another type than float32.
#pragma once

#include <cstdint>
#include <span>

#include "kernels.h"
#include "logits.h"
#include "runtime.h"

namespace tokenspeed::cpu {

// The likeliest token of each row of float32 logits; 0 where none is possible.
void argmax(Runtime& runtime, const In& logits, std::int64_t* tokens);

// A token of each row, drawn from what temperature, min-p, top-k and top-p leave of it.
struct Draw {
    In logits;
    // Of each row, as `DrawSettings` have them.
    const double* uniforms;
    const double* temperatures;
    const std::int64_t* top_ks;
    const double* top_ps;
    const double* min_ps;
    std::int64_t* tokens;
};
void draw(Runtime& runtime, const Draw& call);

// The log-probability of a token of each row, and the `count` likeliest tokens with theirs.
struct Logprobs {
    In logits;
    const std::int64_t* tokens;
    std::int64_t count;  // at most the vocabulary
    float* chosen;
    std::int64_t* ids;  // [rows, count]
    float* values;      // [rows, count]
};
// Throws KernelError: tokens that no row has.
void logprobs(Runtime& runtime, const Logprobs& call);

// Sets logits to minus infinity where a token's bit is not set.
struct Bitmasks {
    Out logits;
    const std::int32_t* words;
    std::int64_t words_per_row;
};
// Throws KernelError: fewer bits than logits.
void apply_bitmask(Runtime& runtime, const Bitmasks& call);

// Makes tokens seen less likely, each of `seen` occurring so often in the output.
// Throws KernelError: tokens that no row has.
void penalise(std::span<float> logits, std::span<const std::int64_t> seen,
              std::span<const std::int32_t> output_counts, const Penalties& penalties);

// Throws KernelError: tokens that no row has.
void add_bias(std::span<float> logits, const Biases& biases);

}  // namespace tokenspeed::cpu
