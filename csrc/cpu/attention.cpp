#include "attention.h"

#include <algorithm>
#include <string>
#include <vector>

#include "errors.h"

namespace tokenspeed::cpu {

namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

// Parts for each thread, so that one which is held up can leave most of its share to others.
constexpr std::int64_t parts_per_thread = 8;
// Fewer blocks than these are not worth being merged with others.
constexpr std::int64_t part_blocks_min = 2;
// A page's writes of one token touch many lines; a few tokens are work for one thread.
constexpr std::int64_t appended_per_chunk = 32;

void check(const KvPages& kv) {
    for (const std::int64_t dim : {kv.head_dim, kv.value_dim}) {
        if (kv.page_size % lanes == 0 && dim % lanes == 0 && dim > 0 && dim <= head_dim_max) {
            continue;
        }
        throw KernelError("pages of " + std::to_string(kv.page_size) + " positions and heads of " +
                          std::to_string(dim) +
                          " elements; both must be multiples of 16, and heads at most " +
                          std::to_string(head_dim_max));
    }
}

// A row's positions as blocks.
struct Blocks {
    std::int64_t first, end;
    std::int64_t count() const { return end - first; }
};

Blocks blocks_of(const Attention& call, std::int64_t row) {
    if (call.seen != nullptr) {
        const std::int32_t* const first = call.seen + 2 * call.rows.query_starts[row];
        const std::int32_t* const last = call.seen + 2 * call.rows.query_starts[row + 1] - 2;
        return {first[0] / block_positions, ceil_div(last[1], block_positions)};
    }
    const std::int64_t context = call.rows.context_lens[row];
    const std::int64_t tokens =
        call.rows.query_starts[row + 1] - std::int64_t{call.rows.query_starts[row]};
    const std::int64_t first =
        call.window == 0 ? 0 : std::max<std::int64_t>(0, context + 1 - call.window);
    return {first / block_positions, ceil_div(context + tokens, block_positions)};
}

void attend_rows(Runtime& runtime, const Attention& call, std::int64_t rows) {
    const std::int64_t heads = call.kv.heads;
    const std::int64_t group = call.heads / heads;
    const std::int64_t tokens_at_once =
        std::max<std::int64_t>(1, runtime.kernels().attention_rows / group);
    const int threads = runtime.pool().threads();

    // Rows whose tokens fit one part are cut into blocks instead, if they are long.
    std::int64_t all_blocks = 0;
    for (std::int64_t row = 0; row < rows; ++row) all_blocks += blocks_of(call, row).count();
    const std::int64_t blocks_at_once =
        threads == 1
            ? all_blocks
            : std::max(part_blocks_min, ceil_div(all_blocks * heads, threads * parts_per_thread));
    std::vector<AttentionPart> parts, merges;
    std::int64_t partial_floats = 0;
    const std::int64_t floats_per_row = call.kv.value_dim + lanes;
    // Offsets until all are known.
    std::vector<std::int64_t> offsets, merge_offsets;
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t tokens =
            call.rows.query_starts[row + 1] - std::int64_t{call.rows.query_starts[row]};
        const Blocks blocks = blocks_of(call, row);
        for (std::int64_t head = 0; head < heads; ++head) {
            if (tokens <= tokens_at_once && blocks.count() > blocks_at_once) {
                const std::int64_t block_floats = tokens * group * floats_per_row;
                merges.push_back({row, head, 0, tokens, blocks.first, blocks.end, nullptr});
                merge_offsets.push_back(partial_floats);
                for (std::int64_t block = blocks.first; block < blocks.end;
                     block += blocks_at_once) {
                    const std::int64_t end = std::min(blocks.end, block + blocks_at_once);
                    parts.push_back({row, head, 0, tokens, block, end, nullptr});
                    offsets.push_back(partial_floats);
                    partial_floats += (end - block) * block_floats;
                }
                continue;
            }
            for (std::int64_t token = 0; token < tokens; token += tokens_at_once) {
                const std::int64_t end = std::min(tokens, token + tokens_at_once);
                parts.push_back({row, head, token, end, blocks.first, blocks.end, nullptr});
                offsets.push_back(-1);
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
        runtime.kernels().attend(call, parts[static_cast<std::size_t>(chunk)],
                                 runtime.scratch(thread));
    });
    runtime.pool().run(static_cast<int>(merges.size()), [&](int chunk, int thread) noexcept {
        runtime.kernels().merge(call, merges[static_cast<std::size_t>(chunk)],
                                runtime.scratch(thread));
    });
}

}  // namespace

void append(Runtime& runtime, const KvAppend& call) {
    check(call.to);
    if (call.k.columns != call.to.heads * call.to.head_dim ||
        call.v.columns != call.to.heads * call.to.value_dim) {
        throw KernelError("K and V of " + std::to_string(call.k.columns) + " and " +
                          std::to_string(call.v.columns) + " elements for a pool of " +
                          std::to_string(call.to.heads) + " x " + std::to_string(call.to.head_dim) +
                          " and " + std::to_string(call.to.value_dim));
    }
    if (call.v.type != call.k.type || call.k.rows != call.v.rows) {
        throw KernelError("K and V must have one type and as many rows");
    }
    runtime.perform(call.k.rows, [&runtime, call](std::int64_t rows) {
        for (std::int64_t token = 0; token < rows; ++token) {
            if (call.slots[token] < 0 || call.slots[token] >= call.to.pages * call.to.page_size) {
                throw KernelError("slot " + std::to_string(call.slots[token]) + " of a pool of " +
                                  std::to_string(call.to.pages) + " pages");
            }
        }
        const std::int64_t chunks = ceil_div(rows, appended_per_chunk);
        runtime.pool().run(static_cast<int>(chunks), [&](int chunk, int) noexcept {
            const std::int64_t end = std::min(rows, (chunk + 1) * appended_per_chunk);
            runtime.kernels().append(call, chunk * appended_per_chunk, end, rows);
        });
    });
}

void attend(Runtime& runtime, const Attention& call, std::int64_t rows) {
    check(call.kv);
    if (call.q.columns != call.heads * call.kv.head_dim || call.heads % call.kv.heads != 0 ||
        call.y.columns != call.heads * call.kv.value_dim || call.y.rows != call.q.rows) {
        throw KernelError("queries of " + std::to_string(call.q.columns) + " elements, " +
                          std::to_string(call.heads) + " heads over " +
                          std::to_string(call.kv.heads) + " KV heads of " +
                          std::to_string(call.kv.head_dim));
    }
    const bool partial = call.log_sums != nullptr;
    if (call.y.type != (partial ? Element::f32 : call.q.type)) {
        throw KernelError(partial ? "a part of an attention is float32"
                                  : "queries and result must have one type");
    }
    if (call.rows.query_starts[rows] != call.q.rows) {
        throw KernelError(std::to_string(call.q.rows) + " queries for rows of " +
                          std::to_string(call.rows.query_starts[rows]) + " tokens");
    }
    if (call.heads / call.kv.heads > runtime.kernels().attention_rows) {
        throw KernelError(std::to_string(call.heads / call.kv.heads) +
                          " query heads of one KV head; at most " +
                          std::to_string(runtime.kernels().attention_rows) + " are supported");
    }
    runtime.perform(rows,
                    [&runtime, call](std::int64_t count) { attend_rows(runtime, call, count); });
}

}  // namespace tokenspeed::cpu
