// Products of quantised rows with packed weights.
//
// One cell of the result, y[m, o], is computed by one thread in one order, whatever surrounds it:
//
//     acc = 0
//     for each step s of 32 inputs:
//         acc = fma(float(sum of q_w * q_x - zero_point * q_x), scale_w * scale_x, acc)
//         acc = fma(minimum_w, scale_x * sum of q_x, acc)            where the format has minima
//
// and of a format that has a scale for each half of a step, with the halves' sums a and b,
//
//         acc = fma(fma(float(b), scale_w of b, float(a) * scale_w of a), scale_x, acc)
//
// The integer sums are exact and fit 24 bits, so how they are added up does not matter. Every path
// below, for one row or for many, on any instruction set, runs this per cell; so results are equal
// bit for bit whatever the batch, the threads and the instruction set.
//
// For few rows the weights go from memory through registers, once: 2 to 8 operations unpack a
// vector of 64 weights, far less than the time their bytes take to come. For many rows a thread
// unpacks a few panels of some inputs into its first cache, and runs all rows over them; it goes
// through all panels of its part before it comes to further inputs, so that the rows' part of
// those inputs stays in its second cache.
//
// Bound for many rows: a CPU that starts two products a cycle starts dots, multiplications and fmas
// on the same two ports, so a step takes 8 of 10 or 11 places there, 73% (minima, w6_nested) or 80%
// (w4, w5, w8) of its peak; conversions, additions and unpacking have ports of their own.

#include "product.inl"

namespace tokenspeed::cpu {
namespace {

// Weights of `panels` panels as they lie in memory.
template <int format_index, int panels>
struct PackedSource {
    static constexpr Format format = formats[format_index];
    static constexpr Scales scales = format.scales;
    static constexpr bool streamed = true;
    // Some 60 ns of reading: what comes from memory is asked for early enough, and is not pushed
    // out of the first cache before it is used.
    static constexpr std::int64_t prefetched_size_bytes = 2048;

    const std::byte* panel[panels];

    TOKENSPEED_INLINE const std::byte* step_at(int p, std::int64_t step) const {
        return panel[p] + format.step_offset(step);
    }
    TOKENSPEED_INLINE const std::byte* header_at(int p, std::int64_t step) const {
        return panel[p] + format.header_offset(step);
    }

    // Asks for what the stream of a panel comes to next.
    TOKENSPEED_INLINE void prefetch(int p, std::int64_t step) const {
        const std::byte* at = step_at(p, step) + prefetched_size_bytes;
        for (std::int64_t line = 0; line < format.step_size_bytes(); line += 64) {
            __builtin_prefetch(at + line);
        }
    }

    template <int quad>
    TOKENSPEED_INLINE Bytes quants(int p, std::int64_t step) const {
        const std::byte* at = step_at(p, step);
        if constexpr (format.bits == 8) {
            return load_bytes(at + quad * quad_size_bytes);
        } else {
            const Bytes pair = load_bytes(at + quad % 4 * quad_size_bytes);
            const Bytes low = quad < 4 ? low_nibbles(pair) : high_nibbles(pair);
            const std::byte* planes = at + 4 * quad_size_bytes;
            if constexpr (format.bits == 5) {
                return or_plane<4 - quad, 0x10>(low, load_bytes(planes));
            } else if constexpr (format.bits == 6) {
                const Bytes plane = load_bytes(planes + quad / 4 * quad_size_bytes);
                return or_plane<4 - 2 * (quad % 4), 0x30>(low, plane);
            } else {
                return low;
            }
        }
    }

    // Scales of the step, or of one half of it.
    template <int half>
    TOKENSPEED_INLINE Floats scale(int p, std::int64_t step) const {
        const std::byte* at = step_at(p, step) + format.quants_size_bytes();
        if constexpr (scales == Scales::nested_minimum) {
            return mul(load_u8(at), load_f16(header_at(p, step)));
        } else if constexpr (scales == Scales::nested_halves) {
            return mul(load_i8(at + half * lanes), load_f16(header_at(p, step)));
        } else {
            return load_f16(at);
        }
    }

    TOKENSPEED_INLINE Floats minimum(int p, std::int64_t step) const {
        const std::byte* at = step_at(p, step) + format.quants_size_bytes();
        if constexpr (scales == Scales::nested_minimum) {
            return mul(load_u8(at + lanes), load_f16(header_at(p, step) + 2 * lanes));
        } else {
            return load_f16(at + 2 * lanes);
        }
    }
};

// The same weights unpacked: eight quads of bytes, then the floats of a step's scales.
template <int format_index, int panels>
struct UnpackedSource {
    static constexpr Format format = formats[format_index];
    static constexpr bool streamed = false;
    static constexpr bool two_scales = format.scales == Scales::nested_halves;
    static constexpr bool second = two_scales || format.has_minimum();
    static constexpr std::int64_t floats_size_bytes = lanes * 4;
    static constexpr std::int64_t step_size_bytes =
        step_quads * quad_size_bytes + (second ? 2 : 1) * floats_size_bytes;

    std::byte* steps;

    TOKENSPEED_INLINE std::byte* step_at(int p, std::int64_t step) const {
        return steps + (step * panels + p) * step_size_bytes;
    }
    TOKENSPEED_INLINE float* floats_at(int p, std::int64_t step, int which) const {
        return reinterpret_cast<float*>(step_at(p, step) + step_quads * quad_size_bytes +
                                        which * floats_size_bytes);
    }
    template <int quad>
    TOKENSPEED_INLINE Bytes quants(int p, std::int64_t step) const {
        return load_bytes(step_at(p, step) + quad * quad_size_bytes);
    }
    template <int half>
    TOKENSPEED_INLINE Floats scale(int p, std::int64_t step) const {
        return load_floats(floats_at(p, step, two_scales ? half : 0));
    }
    TOKENSPEED_INLINE Floats minimum(int p, std::int64_t step) const {
        return load_floats(floats_at(p, step, 1));
    }

    void fill(const PackedSource<format_index, panels>& packed, std::int64_t first,
              std::int64_t count) const {
        for (std::int64_t step = 0; step < count; ++step) {
            for (int p = 0; p < panels; ++p) {
                unroll<step_quads>([&]<int quad>(Constant<quad>) {
                    store(packed.template quants<quad>(p, first + step),
                          step_at(p, step) + quad * quad_size_bytes);
                });
                store(packed.template scale<0>(p, first + step), floats_at(p, step, 0));
                if constexpr (two_scales) {
                    store(packed.template scale<1>(p, first + step), floats_at(p, step, 1));
                } else if constexpr (second) {
                    store(packed.minimum(p, first + step), floats_at(p, step, 1));
                }
            }
        }
    }
};

constexpr int log2(int x) {
    return x <= 1 ? 0 : 1 + log2(x / 2);
}

// A group of rows from some step on.
template <int rows>
struct Inputs {
    static constexpr std::int64_t step_size_bytes = rows * QuantisedRows::row_step_size_bytes;

    const std::byte* group;

    // `group_rows` of the product's inputs are `rows`, and `row` is the first of a group.
    TOKENSPEED_INLINE Inputs(const Product& product, std::int64_t row, std::int64_t step)
        : group(product.x.groups +
                row * QuantisedRows::row_step_size_bytes * (product.inputs / step_inputs) +
                step * step_size_bytes) {}

    TOKENSPEED_INLINE const std::int8_t* values(std::int64_t step, int row) const {
        return reinterpret_cast<const std::int8_t*>(group + step * step_size_bytes +
                                                    row * step_inputs);
    }
    TOKENSPEED_INLINE const RowStep& of(std::int64_t step, int row) const {
        return reinterpret_cast<const RowStep*>(group + step * step_size_bytes +
                                                rows * step_inputs)[row];
    }
};

// Tiles of so many cells leave no registers for sums of products beside them.
constexpr int parked_cells = 16;

// Adds `count` steps of the source to the cells' sums.
template <class Source, int rows, int panels>
TOKENSPEED_INLINE void accumulate(const Source& source, const Inputs<rows>& x, std::int64_t count,
                                  Floats (&acc)[rows][panels]) {
    constexpr Format format = Source::format;
    constexpr bool halves = format.scales == Scales::nested_halves;
    constexpr int shift = log2(format.zero_point());
    // The cells of a tall tile wait in memory while a step's products fill the registers: they are
    // needed once a step, and left to itself the compiler moves sums of products about instead.
    constexpr bool parked = rows * panels >= parked_cells;
    for (std::int64_t step = 0; step < count; ++step) {
        if constexpr (parked) asm("" : "+m"(acc));
        if constexpr (Source::streamed) {
            for (int p = 0; p < panels; ++p) source.prefetch(p, step);
        }
        Ints sums[rows][panels];
        [[maybe_unused]] Floats first_half[rows][panels];
        unroll<step_quads>([&]<int quad>(Constant<quad>) __attribute__((always_inline)) {
            constexpr int half = halves ? quad / (step_quads / 2) : 0;
            if constexpr (quad == 0 || (halves && quad == step_quads / 2)) {
                for (int m = 0; m < rows; ++m) {
                    Ints start = splat_ints(0);
                    if constexpr (format.zero_point() > 0) {
                        const RowStep& inputs = x.of(step, m);
                        if constexpr (!halves) {
                            start = splat_ints(inputs.negative_sum);
                        } else if constexpr (half == 0) {
                            start = splat_ints(inputs.negative_first_half);
                        } else {
                            start = sub(splat_ints(inputs.negative_sum),
                                        splat_ints(inputs.negative_first_half));
                        }
                        start = shift_left<shift>(start);
                    }
                    for (int p = 0; p < panels; ++p) sums[m][p] = start;
                }
            }
            Bytes weights[panels];
            for (int p = 0; p < panels; ++p) weights[p] = source.template quants<quad>(p, step);
            for (int m = 0; m < rows; ++m) {
                const Bytes inputs = splat_quad(x.values(step, m) + quad * 4);
                for (int p = 0; p < panels; ++p) sums[m][p] = dot(sums[m][p], weights[p], inputs);
            }
            if constexpr (quad == step_quads - 1 || (halves && quad == step_quads / 2 - 1)) {
                for (int p = 0; p < panels; ++p) {
                    const Floats scale = source.template scale<half>(p, step);
                    for (int m = 0; m < rows; ++m) {
                        const Floats whole = to_floats(sums[m][p]);
                        const Floats of_inputs = splat(x.of(step, m).scale);
                        if constexpr (!halves) {
                            acc[m][p] = fma(whole, mul(scale, of_inputs), acc[m][p]);
                        } else if constexpr (half == 0) {
                            first_half[m][p] = mul(whole, scale);
                        } else {
                            const Floats both = fma(whole, scale, first_half[m][p]);
                            acc[m][p] = fma(both, of_inputs, acc[m][p]);
                        }
                    }
                }
            }
        });
        if constexpr (format.has_minimum()) {
            for (int p = 0; p < panels; ++p) {
                const Floats minimum = source.minimum(p, step);
                for (int m = 0; m < rows; ++m) {
                    acc[m][p] = fma(minimum, splat(x.of(step, m).scaled_sum), acc[m][p]);
                }
            }
        }
    }
}

// The packed panels first, first + apart, ...; beyond `end` the last one stands in, and is not
// written.
template <int format_index, int panels>
TOKENSPEED_INLINE PackedSource<format_index, panels> packed_panels(const Product& product,
                                                                   std::int64_t first,
                                                                   std::int64_t apart,
                                                                   std::int64_t end) {
    const std::int64_t size = formats[format_index].panel_size_bytes(product.inputs);
    PackedSource<format_index, panels> source;
    for (int p = 0; p < panels; ++p) {
        const std::int64_t panel = first + p * apart;
        source.panel[p] = product.weights + (panel < end ? panel : end - 1) * size;
    }
    return source;
}

// Weights from memory through registers, for groups of `rows` rows. The panels at hand are read as
// so many streams, each of them through a stretch of its own of the part: long streams are what the
// CPU's prefetchers follow. The first group brings the panels into the second cache, where the
// others find them.
template <int format_index, int rows, int panels>
void multiply_streamed(const Product& product, const Part& part) {
    const std::int64_t stretch = (part.panel_end - part.panel + panels - 1) / panels;
    for (std::int64_t panel = part.panel; panel < part.panel + stretch; ++panel) {
        const auto source =
            packed_panels<format_index, panels>(product, panel, stretch, part.panel_end);
        for (std::int64_t row = part.row; row < part.row_end; row += rows) {
            Floats acc[rows][panels];
            clear(acc);
            accumulate(source, Inputs<rows>(product, row, 0), product.inputs / step_inputs, acc);
            for (int m = 0; m < rows && row + m < part.row_end; ++m) {
                for (int p = 0; p < panels; ++p) {
                    const std::int64_t output_panel = panel + p * stretch;
                    if (output_panel < part.panel_end) {
                        write(product, row + m, output_panel, acc[m][p]);
                    }
                }
            }
        }
    }
}

constexpr std::int64_t unpacked_steps_max = 28;
static_assert(rows_max % tile_rows == 0);
constexpr std::size_t unpacked_size_bytes =
    unpacked_steps_max * tile_panels * (step_quads * quad_size_bytes + 2 * lanes * 4);

// Weights unpacked once for all rows of the part, of which there are at most rows_max, as there are
// at most panels_max panels.
template <int format_index>
void multiply_many(const Product& product, const Part& part, std::byte* scratch) {
    constexpr Format format = formats[format_index];
    const UnpackedSource<format_index, tile_panels> unpacked{scratch};
    auto* const sums_start = reinterpret_cast<float*>(scratch + unpacked_size_bytes);
    constexpr std::int64_t tile_floats = tile_rows * tile_panels * lanes;
    const std::int64_t tiles = (part.row_end - part.row + tile_rows - 1) / tile_rows;
    const std::int64_t steps = product.inputs / step_inputs;
    const std::int64_t chunks = (steps + unpacked_steps_max - 1) / unpacked_steps_max;
    const std::int64_t panel_size = format.panel_size_bytes(product.inputs);
    const std::int64_t panels = (product.outputs + lanes - 1) / lanes;
    for_each_chunk(
        part, chunks,
        [&](std::int64_t chunk, std::int64_t panel, std::int64_t next_chunk,
            std::int64_t next_panel) {
            const std::int64_t first = steps * chunk / chunks;
            const std::int64_t count = steps * (chunk + 1) / chunks - first;
            Stretch next[tile_panels];
            for (int p = 0; p < tile_panels; ++p) {
                const std::int64_t at = format.header_offset(steps * next_chunk / chunks);
                const std::int64_t end = format.step_offset(steps * (next_chunk + 1) / chunks);
                const bool some = next_panel + p < panels;
                next[p] = stretch_of(product.weights + (next_panel + p) * panel_size + at,
                                     some ? end - at : 0, tiles);
            }
            unpacked.fill(
                packed_panels<format_index, tile_panels>(product, panel, 1, part.panel_end), first,
                count);
            float* sums = sums_start + (panel - part.panel) / tile_panels * tiles * tile_floats;
            for (std::int64_t tile = 0; tile < tiles; ++tile, sums += tile_floats) {
                const std::int64_t row = part.row + tile * tile_rows;
                const Inputs<tile_rows> x(product, row, first);
                for (const Stretch& of_panel : next) prefetch_share(of_panel, tile);
                Floats acc[tile_rows][tile_panels];
                if (chunk == 0) {
                    clear(acc);
                } else {
                    load_tile(sums, acc);
                }
                accumulate(unpacked, x, count, acc);
                if (chunk == chunks - 1) {
                    write_tile(product, part, row, panel, acc);
                } else {
                    store_tile(acc, sums);
                }
            }
        });
}

template <int format_index>
void multiply(const Product& product, const Part& part, std::byte* scratch) {
    if (part.row_end - part.row > streamed_rows_max) {
        return multiply_many<format_index>(product, part, scratch);
    }
    unroll<few_rows>([&]<int below>(Constant<below>) {
        if (product.x.group_rows == below + 1) {
            multiply_streamed<format_index, below + 1, few_panels[below]>(product, part);
        }
    });
}

}  // namespace
}  // namespace tokenspeed::cpu
