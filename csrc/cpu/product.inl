// What products of quantised and of dense rows share: tiles of the result, and how they are
// written.
#pragma once

#include "math.inl"

namespace tokenspeed::cpu {
namespace {

// Rows of a part, and panels, at most.
constexpr std::int64_t rows_max = 512;
constexpr std::int64_t panels_max = 8;
// Rows of dense weights come in tiles of another height, which need not divide them.
constexpr std::size_t sums_size_bytes = (rows_max + dense_tile_rows) * panels_max * lanes * 4;

// Sets the cells of a tile to zero.
template <int rows, int panels>
TOKENSPEED_INLINE void clear(Floats (&acc)[rows][panels]) {
    for (auto& of_row : acc) {
        for (Floats& cell : of_row) cell = splat(0.0f);
    }
}

// Adds the bias and writes one panel of a row.
TOKENSPEED_INLINE void write(const Product& product, std::int64_t row, std::int64_t panel,
                             Floats acc) {
    const std::int64_t output = panel * lanes;
    const std::int64_t left = product.outputs - output;
    const std::int64_t count = left < lanes ? left : lanes;
    if (product.bias != nullptr) {
        acc = add(acc, load_part(product.bias, product.y_type, output, count));
    }
    store_part(acc, product.y, product.y_type, row * product.y_stride + output, count);
}

// Bytes that the first tiles of some work ask for, each for as many lines: a loop whose length
// changed from tile to tile would be one that the CPU guesses wrong.
struct Stretch {
    const std::byte* at;
    std::int64_t lines_per_tile;
    std::int64_t tiles;
};

// What a panel's bytes are from one step on, shared out to so many tiles.
TOKENSPEED_INLINE Stretch stretch_of(const std::byte* at, std::int64_t size_bytes,
                                     std::int64_t tiles) {
    const std::int64_t lines = (size_bytes + 63) / 64;
    const std::int64_t each = (lines + tiles - 1) / tiles;
    return {at, each, each == 0 ? 0 : (lines + each - 1) / each};
}

TOKENSPEED_INLINE void prefetch_share(const Stretch& bytes, std::int64_t tile) {
    if (tile >= bytes.tiles) return;
    const std::byte* at = bytes.at + tile * bytes.lines_per_tile * 64;
    for (std::int64_t line = 0; line < bytes.lines_per_tile; ++line, at += 64) {
        constexpr int read = 0, second_cache = 2;
        __builtin_prefetch(at, read, second_cache);
    }
}

// Goes through a part's panels, `tile_panels` at a time, for one chunk of its inputs after the
// other: work(chunk, panel, next chunk, next panel).
template <class Work>
TOKENSPEED_INLINE void for_each_chunk(const Part& part, std::int64_t chunks, const Work& work) {
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (std::int64_t panel = part.panel; panel < part.panel_end; panel += tile_panels) {
            const bool last = panel + tile_panels >= part.panel_end;
            if (!last) {
                work(chunk, panel, chunk, panel + tile_panels);
            } else if (chunk + 1 < chunks) {
                work(chunk, panel, chunk + 1, part.panel);
            } else {
                // Most likely the thread gets the part behind this one next.
                work(chunk, panel, 0, part.panel_end);
            }
        }
    }
}

// Sums of a tile that wait for further inputs.
template <int rows, int panels>
TOKENSPEED_INLINE void load_tile(const float* sums, Floats (&acc)[rows][panels]) {
    for (int m = 0; m < rows; ++m) {
        for (int p = 0; p < panels; ++p) acc[m][p] = load_floats(sums + (m * panels + p) * lanes);
    }
}
template <int rows, int panels>
TOKENSPEED_INLINE void store_tile(const Floats (&acc)[rows][panels], float* sums) {
    for (int m = 0; m < rows; ++m) {
        for (int p = 0; p < panels; ++p) store(acc[m][p], sums + (m * panels + p) * lanes);
    }
}

// Writes the tile of rows from `row` on and panels from `panel` on, as far as it lies in the part.
template <int rows, int panels>
TOKENSPEED_INLINE void write_tile(const Product& product, const Part& part, std::int64_t row,
                                  std::int64_t panel, const Floats (&acc)[rows][panels]) {
    const bool whole = product.bias == nullptr && (panel + panels) * lanes <= product.outputs &&
                       panel + panels <= part.panel_end && row + rows <= part.row_end;
    const std::int64_t first = row * product.y_stride + panel * lanes;
    if (whole && product.y_type == Element::f32) {
        float* y = static_cast<float*>(product.y) + first;
        for (int m = 0; m < rows; ++m, y += product.y_stride) {
            for (int p = 0; p < panels; ++p) store(acc[m][p], y + p * lanes);
        }
        return;
    }
    if (whole) {
        auto* y = static_cast<std::uint16_t*>(product.y) + first;
        for (int m = 0; m < rows; ++m, y += product.y_stride) {
            for (int p = 0; p < panels; ++p) store_bf16(acc[m][p], y + p * lanes);
        }
        return;
    }
    for (int m = 0; m < rows && row + m < part.row_end; ++m) {
        for (int p = 0; p < panels && panel + p < part.panel_end; ++p) {
            write(product, row + m, panel + p, acc[m][p]);
        }
    }
}

}  // namespace
}  // namespace tokenspeed::cpu
