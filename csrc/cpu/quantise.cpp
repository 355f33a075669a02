#include "quantise.h"

#include <algorithm>
#include <cstring>

namespace tokenspeed::cpu {

namespace {

// As many as a tile has. More than one tile of few rows are cut so that the fewest rows are zeros.
std::int64_t group_rows(const Kernels& kernels, std::int64_t rows) {
    if (rows > kernels.streamed_rows_max) return kernels.tile_rows;
    if (rows <= kernels.few_rows) return std::max<std::int64_t>(1, rows);
    std::int64_t best = kernels.cut_rows;
    const auto filled = [rows](std::int64_t height) {
        return (rows + height - 1) / height * height;
    };
    for (std::int64_t height = kernels.cut_rows_max; height >= kernels.cut_rows_min; --height) {
        if (filled(height) < filled(best)) best = height;
    }
    return best;
}

}  // namespace

QuantisedRows quantised_rows(const Kernels& kernels, std::byte* memory, std::int64_t rows) {
    return {memory, group_rows(kernels, rows)};
}

std::int64_t quantised_size_bytes(const Kernels& kernels, std::int64_t rows, std::int64_t columns) {
    const std::int64_t row_size = columns / step_inputs * QuantisedRows::row_step_size_bytes;
    return (rows + std::max(kernels.few_rows, kernels.tile_rows) - 1) * row_size;
}

void quantise_rows(const Kernels& kernels, const In& x, std::int64_t first, std::int64_t end,
                   const QuantisedRows& to) {
    for (std::int64_t row = first; row < end; ++row) kernels.quantise(x, row, to);
}

void fill_up(const QuantisedRows& to, std::int64_t rows, std::int64_t columns) {
    const std::int64_t size = to.step_size_bytes();
    for (std::int64_t row = rows; row % to.group_rows != 0; ++row) {
        for (std::int64_t step = 0; step < columns / step_inputs; ++step) {
            std::memset(to.values_at(row, columns) + step * size, 0, step_inputs);
            std::memset(to.steps_at(row, columns) + step * size, 0, sizeof(RowStep));
        }
    }
}

}  // namespace tokenspeed::cpu
