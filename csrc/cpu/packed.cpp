#include "packed.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "convert.h"
#include "errors.h"

namespace tokenspeed::cpu {

namespace {

using Quants = std::array<std::uint8_t, step_inputs>;

std::uint8_t at(const std::byte* block, int index) {
    return static_cast<std::uint8_t>(block[index]);
}

// ggml's block types. `quants` gives the 32 integers of a step of a block, raised by the zero point
// of the native format; `scales` writes one lane of a step's scales, and with the first step of a
// block one lane of the header.
struct Source {
    std::string_view name;
    std::string_view format;
    int block_inputs;
    int block_size_bytes;
    void (*quants)(const std::byte* block, int step, Quants& q);
    void (*scales)(const std::byte* block, int step, int lane, std::byte* scales,
                   std::byte* header);
};

void copy_half(const std::byte* from, std::byte* to, int lane) {
    std::memcpy(to + 2 * lane, from, 2);
}

// The low nibbles of 16 bytes, then the high ones.
void nibbles(const std::byte* from, Quants& q) {
    for (int i = 0; i < 16; ++i) {
        q[static_cast<std::size_t>(i)] = at(from, i) & 15;
        q[static_cast<std::size_t>(i + 16)] = at(from, i) >> 4;
    }
}

// The 32 bits of four bytes, each worth 16.
void add_fifth_bits(const std::byte* from, Quants& q) {
    for (int i = 0; i < step_inputs; ++i) {
        q[static_cast<std::size_t>(i)] |=
            static_cast<std::uint8_t>((at(from, i / 8) >> (i % 8) & 1) << 4);
    }
}

void q4_0(const std::byte* block, int, Quants& q) {
    nibbles(block + 2, q);
}
void q4_1(const std::byte* block, int, Quants& q) {
    nibbles(block + 4, q);
}
void q5_0(const std::byte* block, int, Quants& q) {
    nibbles(block + 6, q);
    add_fifth_bits(block + 2, q);
}
void q5_1(const std::byte* block, int, Quants& q) {
    nibbles(block + 8, q);
    add_fifth_bits(block + 4, q);
}
void q8_0(const std::byte* block, int, Quants& q) {
    for (int i = 0; i < step_inputs; ++i) {
        q[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(at(block, 2 + i) ^ 0x80);
    }
}

void one_scale(const std::byte* block, int, int lane, std::byte* scales, std::byte*) {
    copy_half(block, scales, lane);
}
void scale_and_minimum(const std::byte* block, int, int lane, std::byte* scales, std::byte*) {
    copy_half(block, scales, lane);
    copy_half(block + 2, scales + 2 * lanes, lane);
}

// Two steps share 32 bytes: the even one has the low nibbles.
void k_nibbles(const std::byte* from, int step, Quants& q) {
    for (int i = 0; i < step_inputs; ++i) {
        const std::uint8_t both = at(from, step / 2 * 32 + i);
        q[static_cast<std::size_t>(i)] = step % 2 == 0 ? both & 15 : both >> 4;
    }
}

void q4_k(const std::byte* block, int step, Quants& q) {
    k_nibbles(block + 16, step, q);
}
void q5_k(const std::byte* block, int step, Quants& q) {
    k_nibbles(block + 48, step, q);
    for (int i = 0; i < step_inputs; ++i) {
        q[static_cast<std::size_t>(i)] |=
            static_cast<std::uint8_t>((at(block, 16 + i) >> step & 1) << 4);
    }
}

// Twelve bytes from byte 4 hold eight 6-bit scales and eight 6-bit minima: the first four of each
// in bytes 0-3 and 4-7; of the others four bits in the nibbles of bytes 8-11, and the upper two on
// top of bytes 0-3 and 4-7. The minimum is subtracted, so the header gets it with its sign turned.
void k_scales(const std::byte* block, int step, int lane, std::byte* scales, std::byte* header) {
    const std::byte* packed = block + 4;
    int scale, minimum;
    if (step < 4) {
        scale = at(packed, step) & 63;
        minimum = at(packed, step + 4) & 63;
    } else {
        scale = (at(packed, step + 4) & 15) | at(packed, step - 4) >> 6 << 4;
        minimum = at(packed, step + 4) >> 4 | at(packed, step) >> 6 << 4;
    }
    scales[lane] = static_cast<std::byte>(scale);
    scales[lanes + lane] = static_cast<std::byte>(minimum);
    if (step == 0) {
        copy_half(block, header, lane);
        const std::byte turned[2] = {block[2], block[3] ^ std::byte{0x80}};
        copy_half(turned, header + 2 * lanes, lane);
    }
}

// Each half of a block has 64 bytes of low nibbles and 32 bytes of upper bit pairs; a step is a
// quarter of a half.
void q6_k(const std::byte* block, int step, Quants& q) {
    const int half = step / 4, quarter = step % 4;
    for (int i = 0; i < step_inputs; ++i) {
        const std::uint8_t both = at(block, half * 64 + quarter % 2 * 32 + i);
        const int low = quarter < 2 ? both & 15 : both >> 4;
        const int high = at(block, 128 + half * 32 + i) >> (2 * quarter) & 3;
        q[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(low | high << 4);
    }
}
void q6_k_scales(const std::byte* block, int step, int lane, std::byte* scales, std::byte* header) {
    scales[lane] = block[192 + 2 * step];
    scales[lanes + lane] = block[192 + 2 * step + 1];
    if (step == 0) copy_half(block + 208, header, lane);
}

constexpr std::array<Source, 8> sources{{
    {"Q4_0", "w4", 32, 18, q4_0, one_scale},
    {"Q4_1", "w4_min", 32, 20, q4_1, scale_and_minimum},
    {"Q4_K", "w4_nested", 256, 144, q4_k, k_scales},
    {"Q5_0", "w5", 32, 22, q5_0, one_scale},
    {"Q5_1", "w5_min", 32, 24, q5_1, scale_and_minimum},
    {"Q5_K", "w5_nested", 256, 176, q5_k, k_scales},
    {"Q6_K", "w6_nested", 256, 210, q6_k, q6_k_scales},
    {"Q8_0", "w8", 32, 34, q8_0, one_scale},
}};

// Adds one lane's quants to a step that was zeros.
void place(const Format& format, const Quants& q, int lane, std::byte* step) {
    for (int input = 0; input < step_inputs; ++input) {
        const int quad = input / 4;
        const int byte = lane * 4 + input % 4;
        const unsigned value = q[static_cast<std::size_t>(input)];
        const auto add = [&](int vector, unsigned bits) {
            step[vector * quad_size_bytes + byte] |= static_cast<std::byte>(bits);
        };
        if (format.bits == 8) {
            add(quad, value);
            continue;
        }
        add(quad % 4, (value & 15u) << (quad < 4 ? 0 : 4));
        if (format.bits == 5) add(4, value >> 4 << quad);
        if (format.bits == 6) add(4 + quad / 4, value >> 4 << 2 * (quad % 4));
    }
}

unsigned quant_at(const Format& format, const std::byte* step, int lane, int input) {
    const int quad = input / 4;
    const int byte = lane * 4 + input % 4;
    const auto vector = [&](int index) -> unsigned {
        return at(step + index * quad_size_bytes, byte);
    };
    if (format.bits == 8) return vector(quad);
    unsigned value = vector(quad % 4) >> (quad < 4 ? 0 : 4) & 15;
    if (format.bits == 5) value |= (vector(4) >> quad & 1) << 4;
    if (format.bits == 6) value |= (vector(4 + quad / 4) >> 2 * (quad % 4) & 3) << 4;
    return value;
}

struct ScaleAndMinimum {
    float scale;
    float minimum = 0.0f;
};

ScaleAndMinimum scale_at(Scales kind, const std::byte* scales, const std::byte* header, int lane,
                         int half) {
    const auto half_at = [&](const std::byte* row, int index) {
        return f16_at(row + 2 * (index * lanes + lane));
    };
    if (kind == Scales::plain) return {half_at(scales, 0)};
    if (kind == Scales::minimum) return {half_at(scales, 0), half_at(scales, 1)};
    if (kind == Scales::nested_minimum) {
        return {static_cast<float>(at(scales, lane)) * half_at(header, 0),
                static_cast<float>(at(scales, lanes + lane)) * half_at(header, 1)};
    }
    const auto scale = static_cast<std::int8_t>(at(scales, half * lanes + lane));
    return {static_cast<float>(scale) * half_at(header, 0)};
}

}  // namespace

PackedMatrix::PackedMatrix(std::shared_ptr<Arena> arena, std::size_t format_index,
                           std::int64_t outputs, std::int64_t inputs)
    : arena_(std::move(arena)),
      format_index_(format_index),
      outputs_(outputs),
      inputs_(inputs),
      data_(arena_->allocate(static_cast<std::size_t>(
          panel_count(outputs) * formats[format_index].panel_size_bytes(inputs)))) {}

PackedMatrix PackedMatrix::pack(Runtime& runtime, std::string_view ggml_type,
                                std::span<const std::byte> blocks, std::int64_t outputs,
                                std::int64_t inputs) {
    const auto* source = std::ranges::find(sources, ggml_type, &Source::name);
    if (source == sources.end()) {
        throw KernelError("weights of type " + std::string(ggml_type) + " have no native format");
    }
    const std::int64_t row_size = inputs / source->block_inputs * source->block_size_bytes;
    if (outputs < 1 || inputs < 1 || inputs % source->block_inputs != 0 ||
        static_cast<std::int64_t>(blocks.size()) != outputs * row_size) {
        throw KernelError(std::to_string(blocks.size()) + " bytes of " + std::string(ggml_type) +
                          " are no matrix of " + std::to_string(outputs) + " x " +
                          std::to_string(inputs));
    }
    const auto* format = std::ranges::find(formats, source->format, &Format::name);
    PackedMatrix packed(runtime.arena(), static_cast<std::size_t>(format - formats.begin()),
                        outputs, inputs);
    const int block_steps = source->block_inputs / step_inputs;
    const auto pack_panel = [&](int panel, int) noexcept {
        std::byte* const to =
            packed.data_.data() + panel * packed.format().panel_size_bytes(inputs);
        for (int lane = 0; lane < lanes; ++lane) {
            const std::int64_t output = std::int64_t{panel} * lanes + lane;
            if (output >= outputs) break;
            for (std::int64_t step = 0; step < inputs / step_inputs; ++step) {
                const std::byte* block = blocks.data() + output * row_size +
                                         step / block_steps * source->block_size_bytes;
                const int within = static_cast<int>(step % block_steps);
                std::byte* const step_at = to + format->step_offset(step);
                Quants q;
                source->quants(block, within, q);
                place(*format, q, lane, step_at);
                source->scales(block, within, lane, step_at + format->quants_size_bytes(),
                               to + format->header_offset(step));
            }
        }
    };
    runtime.pool().run(static_cast<int>(panel_count(outputs)), pack_panel);
    return packed;
}

PackedMatrix PackedMatrix::pack_dense(Runtime& runtime, const In& rows) {
    if (rows.rows < 1 || rows.columns < 1) {
        throw KernelError("a matrix of " + std::to_string(rows.rows) + " x " +
                          std::to_string(rows.columns) + " has nothing to pack");
    }
    const auto* format =
        std::ranges::find(formats, rows.type == Element::f32 ? "f32" : "bf16", &Format::name);
    PackedMatrix packed(runtime.arena(), static_cast<std::size_t>(format - formats.begin()),
                        rows.rows, rows.columns);
    const auto pack_panel = [&](int panel, int) noexcept {
        const std::int64_t first = std::int64_t{panel} * lanes;
        for (int lane = 0; lane < std::min<std::int64_t>(lanes, rows.rows - first); ++lane) {
            const auto* from = static_cast<const std::byte*>(rows.at(first + lane));
            for (std::int64_t input = 0; input < rows.columns; ++input) {
                std::memcpy(
                    packed.data_.data() + format->dense_offset(rows.columns, first + lane, input),
                    from + input * rows.element_size_bytes(),
                    static_cast<std::size_t>(rows.element_size_bytes()));
            }
        }
    };
    runtime.pool().run(static_cast<int>(panel_count(rows.rows)), pack_panel);
    return packed;
}

void PackedMatrix::read_row(std::int64_t output, Element type, void* row) const {
    const Format& packed = format();
    if (packed.dense()) {
        for (std::int64_t input = 0; input < inputs_; ++input) {
            const std::byte* const from = data() + packed.dense_offset(inputs_, output, input);
            float weight;
            if (packed.bits == 32) {
                std::memcpy(&weight, from, sizeof weight);
            } else {
                std::uint16_t half;
                std::memcpy(&half, from, sizeof half);
                weight = bf16_to_f32(half);
            }
            if (type == Element::f32) {
                static_cast<float*>(row)[input] = weight;
            } else {
                static_cast<std::uint16_t*>(row)[input] = f32_to_bf16(weight);
            }
        }
        return;
    }
    const int lane = static_cast<int>(output % lanes);
    const std::byte* const panel = data() + output / lanes * packed.panel_size_bytes(inputs_);
    for (std::int64_t step = 0; step < inputs_ / step_inputs; ++step) {
        const std::byte* const step_at = panel + packed.step_offset(step);
        const std::byte* const scales = step_at + packed.quants_size_bytes();
        const std::byte* const header = panel + packed.header_offset(step);
        for (int input = 0; input < step_inputs; ++input) {
            const auto [scale, minimum] =
                scale_at(packed.scales, scales, header, lane, input / (step_inputs / 2));
            const int q = static_cast<int>(quant_at(packed, step_at, lane, input));
            const float centred = static_cast<float>(q - packed.zero_point());
            const float weight = packed.has_minimum() ? centred * scale + minimum : centred * scale;
            const std::int64_t index = step * step_inputs + input;
            if (type == Element::f32) {
                static_cast<float*>(row)[index] = weight;
            } else {
                static_cast<std::uint16_t*>(row)[index] = f32_to_bf16(weight);
            }
        }
    }
}

}  // namespace tokenspeed::cpu
