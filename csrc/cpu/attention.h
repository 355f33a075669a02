// Attention over paged KV, and writes to it, on all threads of a runtime.
//
// What they throw is KernelError: operands of shapes or types that do not fit each other.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "runtime.h"

namespace tokenspeed::cpu {

void append(Runtime& runtime, const KvAppend& call);

// `rows` of the table; q holds their tokens one after the other.
void attend(Runtime& runtime, const Attention& call, std::int64_t rows);

}  // namespace tokenspeed::cpu
