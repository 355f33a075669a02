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

}  // namespace tokenspeed::cpu
