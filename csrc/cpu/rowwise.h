// Operations that take each row of a batch by itself, on all threads of a runtime.
//
// What they throw is KernelError: operands of shapes or types that do not fit each other.
#pragma once

#include <cstdint>
#include <span>

#include "kernels.h"
#include "runtime.h"

namespace tokenspeed::cpu {

void add_rms_norm(Runtime& runtime, const AddRmsNorm& call);

void gate(Runtime& runtime, const Gated& call);

void rotate(Runtime& runtime, const Rotation& call);

// Cosine and sine of position * frequency, in float32 as where models were trained, times a length:
// each [positions, frequencies].
void angles(Runtime& runtime, std::span<const std::int64_t> positions,
            std::span<const float> frequencies, float length, float* cosines, float* sines);

// y = a + b, in float32 and rounded once.
void add(Runtime& runtime, const In& a, const In& b, const Out& y);

// Of each head of a row, what a has of it and behind that what b has; all of one type.
void join(Runtime& runtime, const In& a, const In& b, std::int64_t heads, const Out& y);

// y's row i is x's row indices[i].
// Also thrown: an index of no row.
void take(Runtime& runtime, const In& x, std::span<const std::int64_t> indices, const Out& y);

}  // namespace tokenspeed::cpu
