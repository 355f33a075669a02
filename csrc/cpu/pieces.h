// How products with packed weights are cut into the chunks of a job.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "packed.h"
#include "runtime.h"

namespace tokenspeed::cpu {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

// What one thread reads in some microseconds; less is not worth the help of another.
constexpr std::int64_t weights_per_chunk_size_bytes = 64 << 10;
// Fewer rows of a part would repeat the unpacking of its weights too often.
constexpr std::int64_t part_rows_min = 64;
// Parts for each thread, so that one which is held up can leave most of its share to others.
constexpr std::int64_t parts_per_thread = 8;

// One part of the weight in a job: its product, cut into a grid of chunks so many panels wide and
// rows high.
struct Piece {
    Product product;
    std::size_t format_index;
    std::int64_t panels;
    std::int64_t part_panels;
    std::int64_t part_rows;
    std::int64_t high;
    int chunk_end;  // of the job

    Piece(const Runtime& runtime, int threads, const PackedMatrix& weight, const Product& whole,
          int first_chunk)
        : product(whole), format_index(weight.format_index()), panels(panel_count(whole.outputs)) {
        const Kernels& kernels = runtime.kernels();
        const std::int64_t rows = product.rows;
        const std::int64_t wanted = threads == 1 ? 1 : parts_per_thread * threads;
        if (rows <= kernels.streamed_rows_max) {
            const std::int64_t least = ceil_div(weights_per_chunk_size_bytes,
                                                weight.format().panel_size_bytes(product.inputs));
            const std::int64_t streams = kernels.streams;
            part_panels = ceil_div(std::max(ceil_div(panels, wanted), least), streams) * streams;
            part_rows = rows;
        } else {
            const std::int64_t tile = kernels.tile_panels;
            part_panels = std::clamp<std::int64_t>(ceil_div(panels, wanted) / tile * tile, tile,
                                                   kernels.panels_max);
            part_rows = std::min<std::int64_t>(rows, kernels.rows_max);
            while (part_rows > part_rows_min &&
                   ceil_div(panels, part_panels) * ceil_div(rows, part_rows) < wanted / 2) {
                part_rows = ceil_div(ceil_div(part_rows, 2), kernels.tile_rows) * kernels.tile_rows;
            }
        }
        high = ceil_div(rows, part_rows);
        chunk_end = first_chunk + static_cast<int>(ceil_div(panels, part_panels) * high);
    }

    // Parts of the same panels follow each other: a thread finds their weights in its cache.
    Part part(int chunk) const {
        const std::int64_t panel = chunk / high * part_panels;
        const std::int64_t row = chunk % high * part_rows;
        return {panel, std::min(panels, panel + part_panels), row,
                std::min(product.rows, row + part_rows)};
    }
};

}  // namespace tokenspeed::cpu
