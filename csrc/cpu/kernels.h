// What each instruction set's build of the kernels offers: one table of functions a build.
//
// The functions are the inner work of one thread. They take raw pointers that the callers have
// checked, and never fail.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace tokenspeed::cpu {

enum class Element : std::uint8_t { f32, bf16 };

// What the product needs to know of 32 consecutive inputs of a row beside their integers: their
// scale, scale times sum, and negative sums of all and of either half.
struct RowStep {
    float scale;
    float scaled_sum;
    std::int32_t negative_sum;
    std::int32_t negative_halves[2];
};

// Rows of inputs as signed bytes in [-127, 127], one scale for each step of 32.
struct QuantisedRows {
    const std::int8_t* values;  // [rows, inputs]
    const RowStep* steps;       // [rows, inputs / 32]
};

// y = x W^T + bias, with packed W.
struct Product {
    const std::byte* weights;
    std::int64_t inputs;
    std::int64_t outputs;
    QuantisedRows x;
    const void* bias;  // [outputs] of the type of y, or null
    void* y;           // [rows, outputs]
    std::int64_t y_stride;
    Element y_type;
    std::int64_t rows;
};

// A part of a product: panels [panel, panel_end) of rows [row, row_end).
struct Part {
    std::int64_t panel, panel_end;
    std::int64_t row, row_end;
};

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

    // Quantises one row. `inputs` is a multiple of 32.
    void (*quantise)(const void* x, Element type, std::int64_t inputs, std::int8_t* values,
                     RowStep* steps);
    // By index in `formats`. `scratch` is the thread's own, of `scratch_size_bytes`.
    void (*multiply[formats.size()])(const Product& product, const Part& part, std::byte* scratch);
    // Outputs that are best computed together, in panels; rows likewise, at most.
    int panels_at_once;
    int rows_at_once;
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
