// Operations on packed weights, on all threads of a runtime.
#pragma once

#include <cstdint>
#include <optional>

#include "kernels.h"
#include "packed.h"
#include "runtime.h"

namespace tokenspeed::cpu {

// y = x W^T + bias; bias, of y's type, may be null. W's outputs are cut into parts that hold
// consecutive columns of y.
// Throws KernelError: shapes that do not fit each other.
void linear(Runtime& runtime, const Operand& x, std::span<const PackedMatrix* const> weight,
            const void* bias, const Out& y);

// y[t] = scale W[ids[t]], in float32. Where the table is a part of one, whose row `first` is its
// first, ids of other rows give 0.
// Throws KernelError: an id outside the whole table, or shapes that do not fit.
void lookup(Runtime& runtime, std::span<const std::int64_t> ids, const PackedMatrix& table,
            float scale, std::optional<std::int64_t> first, const Out& y);

}  // namespace tokenspeed::cpu
