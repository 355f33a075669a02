#include "packed.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <string>

#include "convert.h"
#include "errors.h"

namespace tokenspeed::cpu {

namespace {

// The 32 integers of a step as a panel has them: a word is a quad, a byte one of its four inputs.
// Four at a time is fast enough to pack about as fast as memory gives and takes.
using Quants = std::array<std::uint32_t, step_quads>;

// Steps of 16 lanes that the first cache of a core holds twice over.
constexpr std::int64_t tile_steps = 32;

constexpr std::uint32_t every_byte = 0x01010101;
constexpr std::uint32_t low_nibbles = 0x0f * every_byte;

std::uint8_t at(const std::byte* block, int index) {
    return static_cast<std::uint8_t>(block[index]);
}

std::uint32_t word_at(const std::byte* from, std::size_t index) {
    static_assert(std::endian::native == std::endian::little);
    std::uint32_t word;
    std::memcpy(&word, from + 4 * index, sizeof word);
    return word;
}

void copy_half(const std::byte* from, std::byte* to, int lane) {
    std::memcpy(to + 2 * lane, from, 2);
}

// The low nibbles of 16 bytes, then the high ones.
Quants nibbles(const std::byte* from) {
    Quants q;
    for (std::size_t i = 0; i < 4; ++i) {
        q[i] = word_at(from, i) & low_nibbles;
        q[i + 4] = word_at(from, i) >> 4 & low_nibbles;
    }
    return q;
}

// The 32 bits of four bytes, each worth 16.
Quants with_fifth_bits(Quants q, const std::byte* from) {
    const std::uint32_t bits = word_at(from, 0);
    for (std::size_t quad = 0; quad < q.size(); ++quad) {
        // Copies of four bits side by side, then of each copy another bit, which goes to bit 4.
        const std::uint32_t copies = (bits >> 4 * quad & 15) * 0x00204081;
        q[quad] |= (copies & every_byte) << 4;
    }
    return q;
}

Quants q4_0(const std::byte* block, int) {
    return nibbles(block + 2);
}
Quants q4_1(const std::byte* block, int) {
    return nibbles(block + 4);
}
Quants q5_0(const std::byte* block, int) {
    return with_fifth_bits(nibbles(block + 6), block + 2);
}
Quants q5_1(const std::byte* block, int) {
    return with_fifth_bits(nibbles(block + 8), block + 4);
}
Quants q8_0(const std::byte* block, int) {
    Quants q;
    for (std::size_t i = 0; i < q.size(); ++i) q[i] = word_at(block + 2, i) ^ 0x80 * every_byte;
    return q;
}

void one_scale(const std::byte* block, int, int lane, std::byte* scales, std::byte*) {
    copy_half(block, scales, lane);
}
void scale_and_minimum(const std::byte* block, int, int lane, std::byte* scales, std::byte*) {
    copy_half(block, scales, lane);
    copy_half(block + 2, scales + 2 * lanes, lane);
}

// Two steps share 32 bytes: the even one has the low nibbles.
Quants k_nibbles(const std::byte* from, int step) {
    Quants q;
    for (std::size_t i = 0; i < q.size(); ++i) {
        q[i] = word_at(from + step / 2 * 32, i) >> step % 2 * 4 & low_nibbles;
    }
    return q;
}

Quants q4_k(const std::byte* block, int step) {
    return k_nibbles(block + 16, step);
}
Quants q5_k(const std::byte* block, int step) {
    Quants q = k_nibbles(block + 48, step);
    for (std::size_t i = 0; i < q.size(); ++i) {
        q[i] |= (word_at(block + 16, i) >> step & every_byte) << 4;
    }
    return q;
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
Quants q6_k(const std::byte* block, int step) {
    const int half = step / 4, quarter = step % 4;
    const std::byte* const low = block + half * 64 + quarter % 2 * 32;
    const std::byte* const high = block + 128 + half * 32;
    Quants q;
    for (std::size_t i = 0; i < q.size(); ++i) {
        q[i] = (word_at(low, i) >> quarter / 2 * 4 & low_nibbles) |
               (word_at(high, i) >> 2 * quarter & 3 * every_byte) << 4;
    }
    return q;
}
void q6_k_scales(const std::byte* block, int step, int lane, std::byte* scales, std::byte* header) {
    scales[lane] = block[192 + 2 * step];
    scales[lanes + lane] = block[192 + 2 * step + 1];
    if (step == 0) copy_half(block + 208, header, lane);
}

// Writes one lane's quants of a step.
template <std::size_t format_index>
void place(const Quants& q, int lane, std::byte* step) {
    constexpr const Format& format = formats[format_index];
    const auto write = [&](std::size_t vector, std::uint32_t word) {
        std::memcpy(step + vector * quad_size_bytes + static_cast<std::size_t>(lane) * 4, &word,
                    sizeof word);
    };
    if constexpr (format.bits == 8) {
        for (std::size_t quad = 0; quad < q.size(); ++quad) write(quad, q[quad]);
        return;
    }
    for (std::size_t quad = 0; quad < 4; ++quad) {
        write(quad, (q[quad] & low_nibbles) | (q[quad + 4] & low_nibbles) << 4);
    }
    if constexpr (format.bits == 5) {
        std::uint32_t plane = 0;
        for (std::size_t quad = 0; quad < q.size(); ++quad) {
            plane |= (q[quad] >> 4 & every_byte) << quad;
        }
        write(4, plane);
    }
    if constexpr (format.bits == 6) {
        for (std::size_t half = 0; half < 2; ++half) {
            std::uint32_t plane = 0;
            for (std::size_t quad = 0; quad < 4; ++quad) {
                plane |= (q[4 * half + quad] >> 4 & 3 * every_byte) << 2 * quad;
            }
            write(4 + half, plane);
        }
    }
}

// A panel's rows of blocks, as many as there are.
struct Rows {
    const std::byte* first;
    std::int64_t size_bytes;
    std::int64_t count;
    std::int64_t steps;
};

// Packs a panel. `quants` gives the integers of a step of a block, raised by the zero point of the
// native format; `scales` writes one lane of a step's scales, and with the first step of a block
// one lane of the header. Both are known when this is compiled, which makes it twice as fast.
template <std::size_t format_index, int block_steps, int block_size_bytes, auto quants, auto scales>
void pack_panel(const Rows& rows, std::byte* panel) {
    constexpr const Format& format = formats[format_index];
    // Lanes share lines of memory: a tile of steps stays in the first cache until all are done.
    for (std::int64_t tile = 0; tile < rows.steps; tile += tile_steps) {
        const std::int64_t tile_end = std::min(tile + tile_steps, rows.steps);
        for (int lane = 0; lane < rows.count; ++lane) {
            const std::byte* const row = rows.first + lane * rows.size_bytes;
            for (std::int64_t step = tile; step < tile_end; ++step) {
                const std::byte* const block = row + step / block_steps * block_size_bytes;
                const int within = static_cast<int>(step % block_steps);
                std::byte* const step_at = panel + format.step_offset(step);
                place<format_index>(quants(block, within), lane, step_at);
                scales(block, within, lane, step_at + format.quants_size_bytes(),
                       panel + format.header_offset(step));
            }
        }
    }
}

// One of ggml's block types.
struct Source {
    std::string_view name;
    std::size_t format_index;
    int block_inputs;
    int block_size_bytes;
    void (*pack_panel)(const Rows& rows, std::byte* panel);
};

constexpr std::size_t index_of(std::string_view format) {
    return static_cast<std::size_t>(std::ranges::find(formats, format, &Format::name) -
                                    formats.begin());
}

template <std::size_t format_index, int block_inputs, int block_size_bytes, auto quants,
          auto scales>
constexpr Source source(std::string_view name) {
    return {name, format_index, block_inputs, block_size_bytes,
            pack_panel<format_index, block_inputs / step_inputs, block_size_bytes, quants, scales>};
}

constexpr std::array<Source, 8> sources{
    source<index_of("w4"), 32, 18, q4_0, one_scale>("Q4_0"),
    source<index_of("w4_min"), 32, 20, q4_1, scale_and_minimum>("Q4_1"),
    source<index_of("w4_nested"), 256, 144, q4_k, k_scales>("Q4_K"),
    source<index_of("w5"), 32, 22, q5_0, one_scale>("Q5_0"),
    source<index_of("w5_min"), 32, 24, q5_1, scale_and_minimum>("Q5_1"),
    source<index_of("w5_nested"), 256, 176, q5_k, k_scales>("Q5_K"),
    source<index_of("w6_nested"), 256, 210, q6_k, q6_k_scales>("Q6_K"),
    source<index_of("w8"), 32, 34, q8_0, one_scale>("Q8_0"),
};

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
    PackedMatrix packed(runtime.arena(), source->format_index, outputs, inputs);
    const std::int64_t panel_size = packed.format().panel_size_bytes(inputs);
    const auto pack_panel = [&](int panel, int) noexcept {
        const std::int64_t first = std::int64_t{panel} * lanes;
        source->pack_panel({blocks.data() + first * row_size, row_size,
                            std::min<std::int64_t>(lanes, outputs - first), inputs / step_inputs},
                           packed.data_.data() + panel * panel_size);
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
