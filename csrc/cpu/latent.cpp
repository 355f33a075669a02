#include "latent.h"

#include <algorithm>
#include <string>
#include <vector>

#include "errors.h"

namespace tokenspeed::cpu {

namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

// As in attention.cpp.
constexpr std::int64_t parts_per_thread = 8;
constexpr std::int64_t part_blocks_min = 1;
constexpr std::int64_t appended_per_chunk = 64;

void check(const LatentPages& latents) {
    if (latents.dim % lanes != 0 || latents.dim == 0 || latents.dim > latent_dim_max) {
        throw KernelError("latents of " + std::to_string(latents.dim) +
                          " elements; they must be a multiple of 16, at most " +
                          std::to_string(latent_dim_max));
    }
}

void attend_rows(Runtime& runtime, const LatentAttention& call, std::int64_t rows) {
    const auto latent_rows = std::int64_t{runtime.kernels().latent_rows};
    const int threads = runtime.pool().threads();
    const auto count_of = [&](std::int64_t row) {
        const std::int64_t tokens =
            call.rows.query_starts[row + 1] - std::int64_t{call.rows.query_starts[row]};
        return tokens * call.heads;
    };
    // Of some heads' tokens that are a part together, the blocks as far as the last one sees.
    const auto blocks_of = [&](std::int64_t row, std::int64_t end) {
        const std::int64_t last = (end - 1) / call.heads;
        return ceil_div(call.rows.context_lens[row] + last + 1, block_positions);
    };
    std::int64_t all_blocks = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t count = count_of(row);
        for (std::int64_t first = 0; first < count; first += latent_rows) {
            all_blocks += blocks_of(row, std::min(count, first + latent_rows));
        }
    }
    const std::int64_t blocks_at_once =
        threads == 1 ? all_blocks
                     : std::max(part_blocks_min, ceil_div(all_blocks, threads * parts_per_thread));
    std::vector<LatentPart> parts, merges;
    std::vector<std::int64_t> offsets, merge_offsets;
    std::int64_t partial_floats = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t count = count_of(row);
        for (std::int64_t first = 0; first < count; first += latent_rows) {
            const std::int64_t end = std::min(count, first + latent_rows);
            const std::int64_t blocks = blocks_of(row, end);
            if (blocks <= blocks_at_once) {
                parts.push_back({row, first, end, 0, blocks, nullptr});
                offsets.push_back(-1);
                continue;
            }
            merges.push_back({row, first, end, 0, blocks, nullptr});
            merge_offsets.push_back(partial_floats);
            for (std::int64_t block = 0; block < blocks; block += blocks_at_once) {
                const std::int64_t block_end = std::min(blocks, block + blocks_at_once);
                parts.push_back({row, first, end, block, block_end, nullptr});
                offsets.push_back(partial_floats);
                partial_floats += (block_end - block) * (end - first) * (call.value_dim + lanes);
            }
        }
    }
    const auto lease = runtime.lease();
    auto* const partials = reinterpret_cast<float*>(
        lease.memory(static_cast<std::size_t>(partial_floats) * sizeof(float)));
    for (std::size_t part = 0; part < parts.size(); ++part) {
        if (offsets[part] >= 0) parts[part].partials = partials + offsets[part];
    }
    for (std::size_t part = 0; part < merges.size(); ++part) {
        merges[part].partials = partials + merge_offsets[part];
    }
    runtime.pool().run(static_cast<int>(parts.size()), [&](int chunk, int thread) noexcept {
        runtime.kernels().attend_latent(call, parts[static_cast<std::size_t>(chunk)],
                                        runtime.scratch(thread));
    });
    runtime.pool().run(static_cast<int>(merges.size()), [&](int chunk, int thread) noexcept {
        runtime.kernels().merge_latent(call, merges[static_cast<std::size_t>(chunk)],
                                       runtime.scratch(thread));
    });
}

}  // namespace

void append_latents(Runtime& runtime, const LatentAppend& call) {
    check(call.to);
    if (call.latents.columns != call.to.dim) {
        throw KernelError("latents of " + std::to_string(call.latents.columns) +
                          " elements for a pool of " + std::to_string(call.to.dim));
    }
    runtime.perform(call.latents.rows, [&runtime, call](std::int64_t rows) {
        for (std::int64_t token = 0; token < rows; ++token) {
            if (call.slots[token] < 0 || call.slots[token] >= call.to.pages * call.to.page_size) {
                throw KernelError("slot " + std::to_string(call.slots[token]) + " of a pool of " +
                                  std::to_string(call.to.pages) + " pages");
            }
        }
        const std::int64_t chunks = ceil_div(rows, appended_per_chunk);
        runtime.pool().run(static_cast<int>(chunks), [&](int chunk, int) noexcept {
            const std::int64_t end = std::min(rows, (chunk + 1) * appended_per_chunk);
            runtime.kernels().append_latents(call, chunk * appended_per_chunk, end);
        });
    });
}

void attend_latents(Runtime& runtime, const LatentAttention& call, std::int64_t rows) {
    check(call.latents);
    if (call.q.columns != call.heads * call.latents.dim || call.y.rows != call.q.rows ||
        call.y.columns != call.heads * call.value_dim || call.y.type != call.q.type) {
        throw KernelError("queries of " + std::to_string(call.q.columns) + " elements and results" +
                          " of " + std::to_string(call.y.columns) + " for " +
                          std::to_string(call.heads) + " heads over latents of " +
                          std::to_string(call.latents.dim));
    }
    if (call.value_dim % (2 * lanes) != 0 || call.value_dim == 0 ||
        call.value_dim > call.latents.dim) {
        throw KernelError(
            "values of " + std::to_string(call.value_dim) +
            " elements; they must be a multiple of 32, and no more than a latent has");
    }
    if (call.rows.query_starts[rows] != call.q.rows) {
        throw KernelError(std::to_string(call.q.rows) + " queries for rows of " +
                          std::to_string(call.rows.query_starts[rows]) + " tokens");
    }
    runtime.perform(rows,
                    [&runtime, call](std::int64_t count) { attend_rows(runtime, call, count); });
}

}  // namespace tokenspeed::cpu
