// Products of rows with dense weights, bfloat16 by bfloat16 or float32 by float32.
//
// One cell of the result, y[m, o], is computed by one thread in one order, whatever surrounds it:
//
//     acc = 0
//     for each step s of 32 inputs:
//         sum = 0
//         for each pair of inputs i, i + 1 in s (for each input i, in float32):
//             sum = fma(w[o, i + 1], x[m, i + 1], sum);  sum = fma(w[o, i], x[m, i], sum)
//         acc = acc + sum
//
// Sums of sums lose less than one long sum, and additions have a port of their own. Where the CPU
// multiplies bfloat16 itself, numbers below 2^-126 count as zeros; all else is equal bit for bit
// whatever the batch, the threads and the instruction set.
//
// The weights are read as they lie. Of many rows, all of a part run over a few panels of some
// inputs, which the first cache keeps.

#include "product.inl"

namespace tokenspeed::cpu {
namespace {

template <Element type>
struct DenseType;

template <>
struct DenseType<Element::bf16> {
    using Vector = Halves;
    // Inputs of a lane of a vector.
    static constexpr int inputs = 2;
    TOKENSPEED_INLINE static Halves load(const std::byte* at) { return load_halves(at); }
    TOKENSPEED_INLINE static Halves splat_inputs(const std::byte* at) {
        std::uint32_t pair;
        __builtin_memcpy(&pair, at, sizeof pair);
        return splat_halves(pair);
    }
    TOKENSPEED_INLINE static Floats multiply_add(Halves w, Halves x, Floats sum) {
        return dot(sum, w, x);
    }
};

template <>
struct DenseType<Element::f32> {
    using Vector = Floats;
    static constexpr int inputs = 1;
    TOKENSPEED_INLINE static Floats load(const std::byte* at) {
        return load_floats(reinterpret_cast<const float*>(at));
    }
    TOKENSPEED_INLINE static Floats splat_inputs(const std::byte* at) {
        float one;
        __builtin_memcpy(&one, at, sizeof one);
        return splat(one);
    }
    TOKENSPEED_INLINE static Floats multiply_add(Floats w, Floats x, Floats sum) {
        return fma(w, x, sum);
    }
};

template <Element type>
constexpr std::int64_t dense_element = type == Element::f32 ? 4 : 2;
template <Element type>
constexpr std::int64_t dense_step_size_bytes = dense_element<type> * step_inputs * lanes;

// Adds `count` steps of the panels to the cells' sums. `apart_size_bytes` lie from row to row.
template <Element type, bool streamed, int rows, int panels>
TOKENSPEED_INLINE void accumulate_dense(const std::byte* const (&panel)[panels],
                                        const std::byte* const (&x)[rows], std::int64_t count,
                                        Floats (&acc)[rows][panels]) {
    using Type = DenseType<type>;
    constexpr std::int64_t step_size = dense_step_size_bytes<type>;
    constexpr std::int64_t vector_size_bytes = 64;
    constexpr int vectors = step_inputs / Type::inputs;
    for (std::int64_t step = 0; step < count; ++step) {
        if constexpr (streamed) {
            for (int p = 0; p < panels; ++p) {
                for (std::int64_t line = 0; line < step_size; line += 64) {
                    __builtin_prefetch(panel[p] + step * step_size + line + 2 * step_size);
                }
            }
        }
        Floats sums[rows][panels];
        clear(sums);
        unroll<vectors>([&]<int vector>(Constant<vector>) __attribute__((always_inline)) {
            typename Type::Vector weights[panels];
            for (int p = 0; p < panels; ++p) {
                weights[p] = Type::load(panel[p] + step * step_size + vector * vector_size_bytes);
            }
            for (int m = 0; m < rows; ++m) {
                const auto inputs = Type::splat_inputs(
                    x[m] + (step * step_inputs + vector * Type::inputs) * dense_element<type>);
                for (int p = 0; p < panels; ++p) {
                    sums[m][p] = Type::multiply_add(weights[p], inputs, sums[m][p]);
                }
            }
        });
        for (int m = 0; m < rows; ++m) {
            for (int p = 0; p < panels; ++p) acc[m][p] = add(acc[m][p], sums[m][p]);
        }
    }
}

// Rows from `first` on, from the given step; beyond the part's end the last one stands in.
template <Element type, int rows>
TOKENSPEED_INLINE void dense_rows(const Product& product, const Part& part, std::int64_t first,
                                  std::int64_t step, const std::byte* (&x)[rows]) {
    for (int m = 0; m < rows; ++m) {
        const std::int64_t row = first + m < part.row_end ? first + m : part.row_end - 1;
        x[m] = static_cast<const std::byte*>(product.dense) +
               (row * product.dense_stride + step * step_inputs) * dense_element<type>;
    }
}

template <Element type, int rows, int panels>
void multiply_dense_streamed(const Product& product, const Part& part) {
    const std::int64_t steps = product.inputs / step_inputs;
    const std::int64_t panel_size = steps * dense_step_size_bytes<type>;
    const std::int64_t stretch = (part.panel_end - part.panel + panels - 1) / panels;
    for (std::int64_t first = part.panel; first < part.panel + stretch; ++first) {
        const std::byte* panel[panels];
        for (int p = 0; p < panels; ++p) {
            const std::int64_t at = first + p * stretch;
            panel[p] =
                product.weights + (at < part.panel_end ? at : part.panel_end - 1) * panel_size;
        }
        for (std::int64_t row = part.row; row < part.row_end; row += rows) {
            const std::byte* x[rows];
            dense_rows<type>(product, part, row, 0, x);
            Floats acc[rows][panels];
            clear(acc);
            accumulate_dense<type, true>(panel, x, steps, acc);
            for (int m = 0; m < rows && row + m < part.row_end; ++m) {
                for (int p = 0; p < panels; ++p) {
                    const std::int64_t at = first + p * stretch;
                    if (at < part.panel_end) write(product, row + m, at, acc[m][p]);
                }
            }
        }
    }
}

// What half of the first cache holds of a tile's panels.
template <Element type>
constexpr std::int64_t dense_steps_max = 24 * 1024 / (tile_panels * dense_step_size_bytes<type>);

template <Element type>
void multiply_dense_many(const Product& product, const Part& part, std::byte* scratch) {
    constexpr std::int64_t tile_floats = dense_tile_rows * tile_panels * lanes;
    const std::int64_t tiles = (part.row_end - part.row + dense_tile_rows - 1) / dense_tile_rows;
    const std::int64_t steps = product.inputs / step_inputs;
    const std::int64_t panel_size = steps * dense_step_size_bytes<type>;
    const std::int64_t chunks = (steps + dense_steps_max<type> - 1) / dense_steps_max<type>;
    constexpr std::int64_t step_size = dense_step_size_bytes<type>;
    const std::int64_t panels = (product.outputs + lanes - 1) / lanes;
    auto* const sums_start = reinterpret_cast<float*>(scratch);
    for_each_chunk(
        part, chunks,
        [&](std::int64_t chunk, std::int64_t first_panel, std::int64_t next_chunk,
            std::int64_t next_panel) {
            const std::int64_t first = steps * chunk / chunks;
            const std::int64_t count = steps * (chunk + 1) / chunks - first;
            const std::byte* panel[tile_panels];
            Stretch next[tile_panels];
            for (int p = 0; p < tile_panels; ++p) {
                const std::int64_t index =
                    first_panel + p < part.panel_end ? first_panel + p : part.panel_end - 1;
                panel[p] = product.weights + index * panel_size + first * step_size;
                const std::int64_t at = steps * next_chunk / chunks * step_size;
                const std::int64_t end = steps * (next_chunk + 1) / chunks * step_size;
                const bool some = next_panel + p < panels;
                next[p] = stretch_of(product.weights + (next_panel + p) * panel_size + at,
                                     some ? end - at : 0, tiles);
            }
            float* sums =
                sums_start + (first_panel - part.panel) / tile_panels * tiles * tile_floats;
            for (std::int64_t tile = 0; tile < tiles; ++tile, sums += tile_floats) {
                const std::int64_t row = part.row + tile * dense_tile_rows;
                const std::byte* x[dense_tile_rows];
                dense_rows<type>(product, part, row, first, x);
                for (const Stretch& of_panel : next) prefetch_share(of_panel, tile);
                Floats acc[dense_tile_rows][tile_panels];
                if (chunk == 0) {
                    clear(acc);
                } else {
                    load_tile(sums, acc);
                }
                accumulate_dense<type, false>(panel, x, count, acc);
                if (chunk == chunks - 1) {
                    write_tile(product, part, row, first_panel, acc);
                } else {
                    store_tile(acc, sums);
                }
            }
        });
}

template <Element type>
void multiply_dense(const Product& product, const Part& part, std::byte* scratch) {
    const std::int64_t rows = part.row_end - part.row;
    if (rows > streamed_rows_max) {
        return multiply_dense_many<type>(product, part, scratch);
    }
    unroll<few_rows>([&]<int below>(Constant<below>) {
        if (product.x.group_rows == below + 1) {
            multiply_dense_streamed<type, below + 1, few_panels[below]>(product, part);
        }
    });
}

}  // namespace
}  // namespace tokenspeed::cpu
