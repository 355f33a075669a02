// What this machine can do at most, measured on all threads of a runtime.
#pragma once

#include <cstddef>

#include "runtime.h"

namespace tokenspeed::cpu {

// Bytes a second read from a buffer far larger than the caches: the best of `repeats` passes.
double measure_read_bytes_per_s(Runtime& runtime, std::size_t size_bytes, int repeats);

// Operations a second (a multiplication and an addition are two) of each kind of product.
struct Peaks {
    double int8;
    double bf16;
    double f32;
};
Peaks measure_peaks(Runtime& runtime, int repeats);

}  // namespace tokenspeed::cpu
