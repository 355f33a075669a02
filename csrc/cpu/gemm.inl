// Products of quantised rows with packed weights.
//
// One cell of the result, y[m, o], is computed by one thread in one order, whatever surrounds it:
//
//     acc = 0
//     for each step s of 32 inputs (for each half of 16, where a format has a scale for each):
//         acc = fma(float(sum of q_w * q_x - zero_point * q_x), scale_w * scale_x, acc)
//         acc = fma(minimum_w, scale_x * sum of q_x, acc)            where the format has minima
//
// The integer sums are exact and fit 24 bits, so how they are added up does not matter. Every path
// below, for one row or for many, on any instruction set, runs this per cell; so results are equal
// bit for bit whatever the batch, the threads and the instruction set.
//
// For few rows the weights go from memory through registers, once: 2 to 8 operations unpack a
// vector of 64 weights, far less than the time their bytes take to come. For many rows a thread
// unpacks two panels of up to 1024 inputs into its first cache, and runs all rows over them.

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

// Rows of inputs from some step on.
template <int rows>
struct RowPointers {
    const std::int8_t* values[rows];
    const RowStep* steps[rows];
};

// Adds `count` steps of the source to the cells' sums.
template <class Source, int rows, int panels>
TOKENSPEED_INLINE void accumulate(const Source& source, const RowPointers<rows>& x,
                                  std::int64_t count, Floats (&acc)[rows][panels]) {
    constexpr Format format = Source::format;
    constexpr bool halves = format.scales == Scales::nested_halves;
    constexpr int shift = log2(format.zero_point());
    for (std::int64_t step = 0; step < count; ++step) {
        if constexpr (Source::streamed) {
            for (int p = 0; p < panels; ++p) source.prefetch(p, step);
        }
        Ints sums[rows][panels];
        unroll<step_quads>([&]<int quad>(Constant<quad>) __attribute__((always_inline)) {
            constexpr int half = halves ? quad / (step_quads / 2) : 0;
            if constexpr (quad == 0 || (halves && quad == step_quads / 2)) {
                for (int m = 0; m < rows; ++m) {
                    Ints start = splat_ints(0);
                    if constexpr (format.zero_point() > 0) {
                        const RowStep& inputs = x.steps[m][step];
                        start = shift_left<shift>(splat_ints(halves ? inputs.negative_halves[half]
                                                                    : inputs.negative_sum));
                    }
                    for (int p = 0; p < panels; ++p) sums[m][p] = start;
                }
            }
            Bytes weights[panels];
            for (int p = 0; p < panels; ++p) weights[p] = source.template quants<quad>(p, step);
            for (int m = 0; m < rows; ++m) {
                const Bytes inputs = splat_quad(x.values[m] + step * step_inputs + quad * 4);
                for (int p = 0; p < panels; ++p) sums[m][p] = dot(sums[m][p], weights[p], inputs);
            }
            if constexpr (quad == step_quads - 1 || (halves && quad == step_quads / 2 - 1)) {
                for (int p = 0; p < panels; ++p) {
                    const Floats scale = source.template scale<half>(p, step);
                    for (int m = 0; m < rows; ++m) {
                        const Floats both = mul(scale, splat(x.steps[m][step].scale));
                        acc[m][p] = fma(to_floats(sums[m][p]), both, acc[m][p]);
                    }
                }
            }
        });
        if constexpr (format.has_minimum()) {
            for (int p = 0; p < panels; ++p) {
                const Floats minimum = source.minimum(p, step);
                for (int m = 0; m < rows; ++m) {
                    acc[m][p] = fma(minimum, splat(x.steps[m][step].scaled_sum), acc[m][p]);
                }
            }
        }
    }
}

// Adds the bias and writes one panel of a row.
TOKENSPEED_INLINE void write(const Product& product, std::int64_t row, std::int64_t panel,
                             Floats acc) {
    const std::int64_t output = panel * lanes;
    const std::int64_t left = product.outputs - output;
    const std::int64_t count = left < lanes ? left : lanes;
    const bool f32 = product.y_type == Element::f32;
    const std::int64_t element = f32 ? 4 : 2;
    if (product.bias != nullptr) {
        const auto* bias = static_cast<const std::byte*>(product.bias) + output * element;
        alignas(64) std::byte whole[lanes * 4] = {};
        if (count < lanes) {
            __builtin_memcpy(whole, bias, static_cast<std::size_t>(count * element));
            bias = whole;
        }
        acc = add(acc, f32 ? load_floats(reinterpret_cast<const float*>(bias)) : load_bf16(bias));
    }
    auto* y = static_cast<std::byte*>(product.y) + (row * product.y_stride + output) * element;
    alignas(64) std::byte whole[lanes * 4];
    std::byte* const to = count < lanes ? whole : y;
    if (f32) {
        store(acc, reinterpret_cast<float*>(to));
    } else {
        store_bf16(acc, to);
    }
    if (count < lanes) __builtin_memcpy(y, whole, static_cast<std::size_t>(count * element));
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

// Rows from `first` on, from the given step; beyond `end` the last one stands in.
template <int rows>
TOKENSPEED_INLINE RowPointers<rows> row_pointers(const Product& product, std::int64_t first,
                                                 std::int64_t end, std::int64_t step) {
    RowPointers<rows> x;
    for (int m = 0; m < rows; ++m) {
        const std::int64_t row = first + m < end ? first + m : end - 1;
        x.values[m] = product.x.values + row * product.inputs + step * step_inputs;
        x.steps[m] = product.x.steps + row * (product.inputs / step_inputs) + step;
    }
    return x;
}

// Weights from memory through registers, for `rows` rows from `row` on. The panels at hand are read
// as so many streams, each of them through a stretch of its own of the part: long streams are what
// the CPU's prefetchers follow.
template <int format_index, int rows, int panels>
void multiply_few(const Product& product, const Part& part, std::int64_t row) {
    const auto x = row_pointers<rows>(product, row, part.row_end, 0);
    const std::int64_t stretch = (part.panel_end - part.panel + panels - 1) / panels;
    for (std::int64_t panel = part.panel; panel < part.panel + stretch; ++panel) {
        const auto source =
            packed_panels<format_index, panels>(product, panel, stretch, part.panel_end);
        Floats acc[rows][panels];
        for (auto& of_row : acc) {
            for (Floats& cell : of_row) cell = splat(0.0f);
        }
        accumulate(source, x, product.inputs / step_inputs, acc);
        for (int m = 0; m < rows; ++m) {
            for (int p = 0; p < panels; ++p) {
                const std::int64_t output_panel = panel + p * stretch;
                if (output_panel < part.panel_end) write(product, row + m, output_panel, acc[m][p]);
            }
        }
    }
}

constexpr std::int64_t unpacked_steps = 32;
constexpr std::int64_t rows_max = 512;
constexpr std::size_t unpacked_size_bytes =
    unpacked_steps * tile_panels * (step_quads * quad_size_bytes + 2 * lanes * 4);
constexpr std::size_t sums_size_bytes = rows_max * tile_panels * lanes * 4;

// Weights unpacked once for all rows of the part, of which there are at most rows_max.
template <int format_index>
void multiply_many(const Product& product, const Part& part, std::byte* scratch) {
    const UnpackedSource<format_index, tile_panels> unpacked{scratch};
    auto* const sums = reinterpret_cast<float*>(scratch + unpacked_size_bytes);
    const std::int64_t steps = product.inputs / step_inputs;
    for (std::int64_t panel = part.panel; panel < part.panel_end; panel += tile_panels) {
        const auto packed =
            packed_panels<format_index, tile_panels>(product, panel, 1, part.panel_end);
        for (std::int64_t first = 0; first < steps; first += unpacked_steps) {
            const std::int64_t left = steps - first;
            const std::int64_t count = left < unpacked_steps ? left : unpacked_steps;
            unpacked.fill(packed, first, count);
            for (std::int64_t row = part.row; row < part.row_end; row += tile_rows) {
                const auto x = row_pointers<tile_rows>(product, row, part.row_end, first);
                float* const kept = sums + (row - part.row) * tile_panels * lanes;
                Floats acc[tile_rows][tile_panels];
                for (int m = 0; m < tile_rows; ++m) {
                    for (int p = 0; p < tile_panels; ++p) {
                        acc[m][p] = first == 0 || row + m >= part.row_end
                                        ? splat(0.0f)
                                        : load_floats(kept + (m * tile_panels + p) * lanes);
                    }
                }
                accumulate(unpacked, x, count, acc);
                const bool last = first + count == steps;
                for (int m = 0; m < tile_rows && row + m < part.row_end; ++m) {
                    for (int p = 0; p < tile_panels; ++p) {
                        if (!last) {
                            store(acc[m][p], kept + (m * tile_panels + p) * lanes);
                        } else if (panel + p < part.panel_end) {
                            write(product, row + m, panel + p, acc[m][p]);
                        }
                    }
                }
            }
        }
    }
}

template <int format_index>
void multiply(const Product& product, const Part& part, std::byte* scratch) {
    switch (part.row_end - part.row) {
        case 1:
            return multiply_few<format_index, 1, few_panels[0]>(product, part, part.row);
        case 2:
            return multiply_few<format_index, 2, few_panels[1]>(product, part, part.row);
        case 3:
            return multiply_few<format_index, 3, few_panels[2]>(product, part, part.row);
        case 4:
            return multiply_few<format_index, 4, few_panels[3]>(product, part, part.row);
        default:
            return multiply_many<format_index>(product, part, scratch);
    }
}

constexpr float scale_min = 0x1p-100f;

void quantise(const void* x, Element type, std::int64_t inputs, std::int8_t* values,
              RowStep* steps) {
    for (std::int64_t first = 0; first < inputs; first += step_inputs, ++steps) {
        Floats halves[2];
        for (int half = 0; half < 2; ++half) {
            const std::int64_t at = first + half * lanes;
            halves[half] = type == Element::f32
                               ? load_floats(static_cast<const float*>(x) + at)
                               : load_bf16(static_cast<const std::uint16_t*>(x) + at);
        }
        const float largest = max_abs(halves[0], halves[1]);
        // Of inputs smaller than any model's nothing is left, rather than an infinite factor.
        const bool some = largest >= scale_min;
        const Floats factor = splat(some ? 127.0f / largest : 0.0f);
        std::int32_t total = 0;
        for (int half = 0; half < 2; ++half) {
            const Ints rounded = to_ints(mul(halves[half], factor));
            store_bytes(rounded, values + first + half * lanes);
            const std::int32_t part = sum(rounded);
            steps->negative_halves[half] = -part;
            total += part;
        }
        steps->scale = some ? largest / 127.0f : 0.0f;
        steps->scaled_sum = steps->scale * static_cast<float>(total);
        steps->negative_sum = -total;
    }
}

}  // namespace
}  // namespace tokenspeed::cpu
