// The native formats of weights, and how a matrix lies in memory.
//
// A matrix of O outputs and I inputs is cut into panels of 16 outputs, one for each lane of a
// vector; outputs beyond O are zeros. A panel is read from front to back. It is a row of steps of
// 32 inputs; a step holds its quants and then its scales. Eight steps of a nested format share a
// header, which lies before them.
//
// A weight is  scale * (q - zero_point) + minimum  with an unsigned integer q of 4, 5, 6 or 8 bits.
// Quants lie as the dot product of bytes wants them: a quad is a vector of 64 bytes with four
// consecutive inputs of each lane, and a step is eight quads. Their low four bits are nibbles: quad
// j shares a vector with quad j + 4, which has the upper nibble. Upper bits lie in planes: one
// vector has the fifth bits of all eight quads, one vector the upper two bits of four quads.
// Quants of eight bits are bytes.
//
// Dense weights have panels and steps too, and inputs that are zeros up to a whole step. A vector
// of a step has a pair of consecutive bfloat16 inputs of each lane, or one float32.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tokenspeed::cpu {

constexpr int lanes = 16;
constexpr int quad_size_bytes = 4 * lanes;
constexpr int step_inputs = 32;
constexpr int step_quads = step_inputs / 4;
constexpr int nested_steps = 8;

enum class Scales : std::uint8_t {
    // Dense: the weights themselves.
    none,
    // A float16 scale for each step.
    plain,
    // A float16 scale and a float16 minimum for each step.
    minimum,
    // An 8-bit scale and an 8-bit minimum for each step, which count in units of the header's
    // float16 scale and negative float16 minimum.
    nested_minimum,
    // A signed 8-bit scale for each half of a step, in units of the header's float16 scale.
    nested_halves,
};

// Steps that so many inputs take.
constexpr std::int64_t step_count(std::int64_t inputs) {
    return (inputs + step_inputs - 1) / step_inputs;
}

struct Format {
    std::string_view name;
    int bits;
    Scales scales;

    constexpr bool dense() const { return scales == Scales::none; }
    constexpr bool nested() const { return scales >= Scales::nested_minimum; }
    constexpr bool has_minimum() const {
        return scales == Scales::minimum || scales == Scales::nested_minimum;
    }
    // Quantised formats without minima are symmetric.
    constexpr int zero_point() const { return dense() || has_minimum() ? 0 : 1 << (bits - 1); }

    constexpr std::int64_t quants_size_bytes() const { return quad_size_bytes * bits; }
    constexpr std::int64_t step_size_bytes() const {
        if (dense()) return quants_size_bytes();
        return quants_size_bytes() + (scales == Scales::minimum ? 4 * lanes : 2 * lanes);
    }
    constexpr std::int64_t header_size_bytes() const {
        if (scales == Scales::nested_minimum) return 4 * lanes;
        return scales == Scales::nested_halves ? 2 * lanes : 0;
    }
    // Where in a panel a step begins, and its header.
    constexpr std::int64_t step_offset(std::int64_t step) const {
        if (!nested()) return step * step_size_bytes();
        return header_offset(step) + header_size_bytes() + step % nested_steps * step_size_bytes();
    }
    constexpr std::int64_t header_offset(std::int64_t step) const {
        return step / nested_steps * (header_size_bytes() + nested_steps * step_size_bytes());
    }
    // Inputs of a row must be a multiple of this.
    constexpr int block_inputs() const {
        if (dense()) return 1;
        return nested() ? nested_steps * step_inputs : step_inputs;
    }
    constexpr std::int64_t panel_size_bytes(std::int64_t inputs) const {
        const std::int64_t steps = step_count(inputs);
        return nested() ? header_offset(steps) : step_offset(steps);
    }
    // Where in a matrix of dense weights one of them lies.
    constexpr std::int64_t dense_offset(std::int64_t inputs, std::int64_t output,
                                        std::int64_t input) const {
        const std::int64_t element = bits / 8;
        const std::int64_t lane_inputs = 4 / element;
        const std::int64_t vector = input / lane_inputs;
        return output / lanes * panel_size_bytes(inputs) + vector * lanes * 4 + output % lanes * 4 +
               input % lane_inputs * element;
    }
};

constexpr std::array<Format, 10> formats{{
    {"w4", 4, Scales::plain},
    {"w4_min", 4, Scales::minimum},
    {"w4_nested", 4, Scales::nested_minimum},
    {"w5", 5, Scales::plain},
    {"w5_min", 5, Scales::minimum},
    {"w5_nested", 5, Scales::nested_minimum},
    {"w6_nested", 6, Scales::nested_halves},
    {"w8", 8, Scales::plain},
    {"bf16", 16, Scales::none},
    {"f32", 32, Scales::none},
}};

constexpr std::int64_t panel_count(std::int64_t outputs) {
    return (outputs + lanes - 1) / lanes;
}

}  // namespace tokenspeed::cpu
