#include "latent.h"

#include <algorithm>
#include <cmath>
#include <limits>
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
// What blocks of parts of a context may leave at a time, for each thread: as much as stays in its
// caches.
constexpr std::int64_t wave_floats = std::int64_t{1} << 19;
constexpr double ln_2 = 0.6931471805599453;

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

// Rows of which each token sees one position more than the one before, as the kernels have it, made
// of rows of which it may see as many: those are divided where it does.
struct Runs {
    Runs(const RowTable& table, std::int64_t rows, const std::int32_t* seen) {
        for (std::int64_t row = 0; row < rows; ++row) {
            for (std::int32_t token = table.query_starts[row]; token < table.query_starts[row + 1];
                 ++token) {
                if (token > table.query_starts[row] && seen[token] == seen[token - 1] + 1) continue;
                query_starts.push_back(token);
                context_lens.push_back(seen[token] - 1);
                slots.push_back(table.slots[row]);
            }
        }
        count = static_cast<std::int64_t>(slots.size());
        query_starts.push_back(table.query_starts[rows]);
    }
    std::vector<std::int32_t> query_starts, context_lens, slots;
    std::int64_t count;
};

// Heads' tokens that are a part together, and all blocks that the last of them sees.
struct PartGroup {
    LatentPart part;
    std::int64_t block_floats;
    std::int64_t floats() const { return part.block_end * block_floats; }
};

// Means and logarithms of a group's rows, of what its blocks left.
void end_group(Runtime& runtime, const LatentAttention& call, const LatentPart& part,
               float* log_sums, int thread) {
    runtime.kernels().merge_latent(call, part, runtime.scratch(thread));
    const std::int64_t rows = part.end - part.first, size = call.value_dim + lanes;
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t token =
            call.rows.query_starts[part.row] + (part.first + row) / call.heads;
        const std::int64_t head = (part.first + row) % call.heads;
        // A block's largest score, as a power of two, and its sum; a sum of 0 is of nothing seen.
        const auto block = [&](std::int64_t index) {
            return part.partials + (index * rows + row) * size;
        };
        const std::int64_t seen =
            call.rows.context_lens[part.row] + (part.first + row) / call.heads + 1;
        const std::int64_t blocks = ceil_div(seen, block_positions);
        float* const log_sum = log_sums + token * call.heads + head;
        if (blocks == 0) {
            auto* const mean = static_cast<float*>(call.y.at(token)) + head * call.value_dim;
            std::fill_n(mean, call.value_dim, 0.0f);
            *log_sum = -std::numeric_limits<float>::infinity();
            continue;
        }
        float peak = block(0)[0];
        for (std::int64_t index = 1; index < blocks; ++index)
            peak = std::max(peak, block(index)[0]);
        double total = 0.0;
        for (std::int64_t index = 0; index < blocks; ++index) {
            total += block(index)[1] * std::exp2(static_cast<double>(block(index)[0]) - peak);
        }
        *log_sum = static_cast<float>(peak * ln_2 + std::log(total));
    }
}

void attend_parts(Runtime& runtime, LatentAttention call, std::int64_t rows,
                  const std::int32_t* seen, float* log_sums) {
    const Runs runs(call.rows, rows, seen);
    call.rows.query_starts = runs.query_starts.data();
    call.rows.context_lens = runs.context_lens.data();
    call.rows.slots = runs.slots.data();
    const auto latent_rows = std::int64_t{runtime.kernels().latent_rows};
    const int threads = runtime.pool().threads();
    std::vector<PartGroup> groups;
    for (std::int64_t run = 0; run < runs.count; ++run) {
        const std::int64_t tokens = runs.query_starts[static_cast<std::size_t>(run) + 1] -
                                    std::int64_t{runs.query_starts[static_cast<std::size_t>(run)]};
        for (std::int64_t first = 0; first < tokens * call.heads; first += latent_rows) {
            const std::int64_t end = std::min(tokens * call.heads, first + latent_rows);
            const std::int64_t sees =
                runs.context_lens[static_cast<std::size_t>(run)] + (end - 1) / call.heads + 1;
            groups.push_back({{run, first, end, 0, ceil_div(sees, block_positions), nullptr},
                              (end - first) * (call.value_dim + lanes)});
        }
    }
    const auto lease = runtime.lease();
    std::vector<LatentPart> parts;
    for (std::size_t first = 0; first < groups.size();) {
        // As many as leave no more than a wave may, and one at least.
        std::size_t end = first;
        std::int64_t floats = 0, all_blocks = 0;
        while (end < groups.size() &&
               (end == first || floats + groups[end].floats() <= wave_floats * threads)) {
            floats += groups[end].floats();
            all_blocks += groups[end].part.block_end;
            ++end;
        }
        auto* partials = reinterpret_cast<float*>(
            lease.memory(static_cast<std::size_t>(floats) * sizeof(float)));
        const std::int64_t blocks_at_once =
            threads == 1
                ? std::max<std::int64_t>(1, all_blocks)
                : std::max(part_blocks_min, ceil_div(all_blocks, threads * parts_per_thread));
        parts.clear();
        for (std::size_t group = first; group < end; ++group) {
            LatentPart& whole = groups[group].part;
            whole.partials = partials;
            for (std::int64_t block = 0; block < whole.block_end; block += blocks_at_once) {
                LatentPart part = whole;
                part.block = block;
                part.block_end = std::min(whole.block_end, block + blocks_at_once);
                part.partials = partials + block * groups[group].block_floats;
                parts.push_back(part);
            }
            partials += groups[group].floats();
        }
        runtime.pool().run(static_cast<int>(parts.size()), [&](int chunk, int thread) noexcept {
            runtime.kernels().attend_latent(call, parts[static_cast<std::size_t>(chunk)],
                                            runtime.scratch(thread));
        });
        runtime.pool().run(static_cast<int>(end - first), [&](int chunk, int thread) noexcept {
            end_group(runtime, call, groups[first + static_cast<std::size_t>(chunk)].part, log_sums,
                      thread);
        });
        first = end;
    }
}

void check(const LatentAttention& call, std::int64_t rows, Element result) {
    check(call.latents);
    if (call.q.columns != call.heads * call.latents.dim || call.y.rows != call.q.rows ||
        call.y.columns != call.heads * call.value_dim || call.y.type != result) {
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
    check(call, rows, call.q.type);
    runtime.perform(rows,
                    [&runtime, call](std::int64_t count) { attend_rows(runtime, call, count); });
}

void attend_latent_parts(Runtime& runtime, const LatentAttention& call, std::int64_t rows,
                         const std::int32_t* seen, float* log_sums) {
    check(call, rows, Element::f32);
    runtime.perform(rows, [&runtime, call, seen, log_sums](std::int64_t count) {
        attend_parts(runtime, call, count, seen, log_sums);
    });
}

}  // namespace tokenspeed::cpu
