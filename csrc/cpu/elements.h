// Single elements of rows, as float32: for what is too little work to have vectors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "convert.h"
#include "kernels.h"

namespace tokenspeed::cpu {
namespace {

inline float element_of(const In& rows, std::int64_t row, std::int64_t column) {
    const auto* const at =
        static_cast<const std::byte*>(rows.at(row)) + column * rows.element_size_bytes();
    if (rows.type == Element::f32) {
        float value;
        std::memcpy(&value, at, sizeof value);
        return value;
    }
    std::uint16_t half;
    std::memcpy(&half, at, sizeof half);
    return bf16_to_f32(half);
}

// Rounded to the rows' type.
inline void store_element(const Out& rows, std::int64_t row, std::int64_t column, float value) {
    auto* const at = static_cast<std::byte*>(rows.at(row)) + column * rows.element_size_bytes();
    if (rows.type == Element::f32) {
        std::memcpy(at, &value, sizeof value);
        return;
    }
    const std::uint16_t half = f32_to_bf16(value);
    std::memcpy(at, &half, sizeof half);
}

}  // namespace
}  // namespace tokenspeed::cpu
