// Operations on packed weights, on all threads of a runtime.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "packed.h"
#include "runtime.h"

namespace tokenspeed::cpu {

// A dense matrix of the caller's: rows of `columns` elements, `stride` elements apart.
template <class Pointer>
struct Rows {
    Pointer data;
    Element type;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t stride;
};

// y = x W^T + bias; bias, of y's type, may be null. W's outputs are cut into parts that hold
// consecutive columns of y.
// Throws KernelError: shapes that do not fit each other.
void linear(Runtime& runtime, const Rows<const void*>& x,
            std::span<const PackedMatrix* const> weight, const void* bias, const Rows<void*>& y);

// y[t] = W[ids[t]].
// Throws KernelError: an id outside the table, or shapes that do not fit.
void lookup(Runtime& runtime, std::span<const std::int64_t> ids, const PackedMatrix& table,
            const Rows<void*>& y);

}  // namespace tokenspeed::cpu
