// Attention over paged latents, and writes to them, on all threads of a runtime.
//
// What they throw is KernelError: operands of shapes or types that do not fit each other.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "runtime.h"

namespace tokenspeed::cpu {

void append_latents(Runtime& runtime, const LatentAppend& call);

// `rows` of the table; q holds their tokens one after the other.
void attend_latents(Runtime& runtime, const LatentAttention& call, std::int64_t rows);

// The same where pages hold some positions of each row only: a token attends to the first of those,
// as many as `seen` [tokens] says. y is float32, and 0 where nothing is seen. For each token and
// head `log_sums` [tokens, heads] gets the logarithm of the sum that softmax divides by, -inf where
// nothing is seen.
void attend_latent_parts(Runtime& runtime, const LatentAttention& call, std::int64_t rows,
                         const std::int32_t* seen, float* log_sums);

}  // namespace tokenspeed::cpu
