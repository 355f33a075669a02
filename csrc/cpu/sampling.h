// Tokens from logits, on all threads of a runtime. Of two tokens the likelier is the one with the
// greater logit, and on equal logits the one with the lower id. NaN counts as minus infinity, and
// plus infinity as the greatest finite number.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "runtime.h"

namespace tokenspeed::cpu {

// The likeliest token of each row of float32 logits; 0 where none is possible.
// Throws KernelError: logits of another type.
void argmax(Runtime& runtime, const In& logits, std::int64_t* tokens);

// A token of each row, drawn from what temperature, min-p, top-k and top-p leave of it.
struct Draw {
    In logits;                   // float32
    const double* uniforms;      // within (0, 1)
    const double* temperatures;  // above 0
    const std::int64_t* top_ks;  // at least 1; the vocabulary or more keeps all
    const double* top_ps;        // 1 keeps all
    const double* min_ps;        // 0 keeps all
    std::int64_t* tokens;
};

// Throws KernelError: logits of another type.
void draw(Runtime& runtime, const Draw& call);

}  // namespace tokenspeed::cpu
