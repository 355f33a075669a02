// Rows as packed products read them: how many lie together, and what they take.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace tokenspeed::cpu {

// The rows of a call with so many, in memory that has room for them.
QuantisedRows quantised_rows(const Kernels& kernels, std::byte* memory, std::int64_t rows);

// Room for so many rows of so many elements, or for fewer.
std::int64_t quantised_size_bytes(const Kernels& kernels, std::int64_t rows, std::int64_t columns);

// Quantises rows [first, end) of x.
void quantise_rows(const Kernels& kernels, const In& x, std::int64_t first, std::int64_t end,
                   const QuantisedRows& to);

// Fills the last group up with zeros, behind so many rows.
void fill_up(const QuantisedRows& to, std::int64_t rows, std::int64_t columns);

}  // namespace tokenspeed::cpu
