#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "errors.h"
#include "pieces.h"
#include "quantise.h"

namespace tokenspeed::cpu {

namespace {

// Rows that a thread quantises in less time than it takes to share them out.
constexpr std::int64_t elements_per_chunk = 1 << 14;
// Dense weights are as wide as whole steps, and read rows as they lie if these are too; others are
// copied to the lease's memory.
In whole_steps(const Runtime::Lease& lease, const In& x) {
    if (x.columns % step_inputs == 0) return x;
    const std::int64_t columns = step_count(x.columns) * step_inputs;
    const auto size = static_cast<std::size_t>(x.rows * columns * x.element_size_bytes());
    std::byte* const memory = lease.memory(size);
    std::memset(memory, 0, size);
    const In whole{memory, x.type, x.rows, columns, columns};
    for (std::int64_t row = 0; row < x.rows; ++row) {
        std::memcpy(const_cast<void*>(whole.at(row)), x.at(row),
                    static_cast<std::size_t>(x.columns * x.element_size_bytes()));
    }
    return whole;
}

// y = x W^T + bias, of operands that fit.
void multiply_all(Runtime& runtime, const Operand& x,
                  const std::vector<const PackedMatrix*>& weight, const void* bias, const Out& y) {
    if (y.rows == 0) return;
    const auto lease = runtime.lease();
    const int threads = runtime.pool().threads();
    const bool dense = weight.front()->format().dense();
    const In whole = dense ? whole_steps(lease, x.rows) : In{};
    std::vector<Piece> pieces;
    pieces.reserve(weight.size());
    std::int64_t first = 0;
    const std::int64_t element = y.element_size_bytes();
    for (const PackedMatrix* part : weight) {
        const auto* const part_bias = static_cast<const std::byte*>(bias);
        pieces.emplace_back(runtime, threads, *part,
                            Product{.weights = part->data(),
                                    .inputs = step_count(part->inputs()) * step_inputs,
                                    .outputs = part->outputs(),
                                    .x = {},
                                    .dense = whole.data,
                                    .dense_stride = whole.stride,
                                    .bias = bias == nullptr ? nullptr : part_bias + first * element,
                                    .y = static_cast<std::byte*>(y.data) + first * element,
                                    .y_stride = y.stride,
                                    .y_type = y.type,
                                    .rows = y.rows},
                            pieces.empty() ? 0 : pieces.back().chunk_end);
        first += part->outputs();
    }
    const Kernels& kernels = runtime.kernels();
    const int chunks = pieces.back().chunk_end;
    const auto multiply = [&](const QuantisedRows& inputs, int chunk, int thread) {
        int begin = 0;
        for (const Piece& piece : pieces) {
            if (chunk < piece.chunk_end) {
                Product product = piece.product;
                product.x = inputs;
                kernels.multiply[piece.format_index](product, piece.part(chunk - begin),
                                                     runtime.scratch(thread));
                return;
            }
            begin = piece.chunk_end;
        }
    };
    QuantisedRows rows = quantised_rows(kernels, x.quantised.groups, y.rows);
    if (dense || x.quantised.groups != nullptr) {
        runtime.pool().run(chunks,
                           [&](int chunk, int thread) noexcept { multiply(rows, chunk, thread); });
        return;
    }
    const std::int64_t columns = x.rows.columns;
    const std::int64_t rows_size = quantised_size_bytes(kernels, y.rows, columns);
    if (y.rows * columns <= elements_per_chunk) {
        // Each thread quantises all rows for itself, with the first chunk it gets: one job, and
        // nobody waits for what another thread writes.
        constexpr std::int64_t line = 64;
        const std::int64_t own_size = line + ceil_div(rows_size, line) * line;
        std::byte* const memory = lease.memory(static_cast<std::size_t>(own_size * threads));
        for (int thread = 0; thread < threads; ++thread) memory[own_size * thread] = std::byte{0};
        runtime.pool().run(chunks, [&](int chunk, int thread) noexcept {
            std::byte* const done = memory + own_size * thread;
            const QuantisedRows own{done + line, rows.group_rows};
            if (*done == std::byte{0}) {
                quantise_rows(kernels, x.rows, 0, y.rows, own);
                fill_up(own, y.rows, columns);
                *done = std::byte{1};
            }
            multiply(own, chunk, thread);
        });
        return;
    }
    rows.groups = lease.memory(static_cast<std::size_t>(rows_size));
    fill_up(rows, y.rows, columns);
    const std::int64_t rows_per_chunk =
        std::max<std::int64_t>(1, elements_per_chunk / columns / rows.group_rows) * rows.group_rows;
    runtime.pool().run(static_cast<int>(ceil_div(y.rows, rows_per_chunk)),
                       [&](int chunk, int) noexcept {
                           quantise_rows(kernels, x.rows, chunk * rows_per_chunk,
                                         std::min(y.rows, (chunk + 1) * rows_per_chunk), rows);
                       });
    runtime.pool().run(chunks,
                       [&](int chunk, int thread) noexcept { multiply(rows, chunk, thread); });
}

}  // namespace

void linear(Runtime& runtime, const Operand& x, std::span<const PackedMatrix* const> weight,
            const void* bias, const Out& y) {
    std::int64_t outputs = 0;
    for (const PackedMatrix* part : weight) {
        outputs += part->outputs();
        if (part->inputs() != x.rows.columns) {
            throw KernelError("x has rows of " + std::to_string(x.rows.columns) +
                              " elements, but the weight takes " + std::to_string(part->inputs()));
        }
    }
    if (y.columns != outputs || y.rows != x.rows.rows) {
        throw KernelError("y is " + std::to_string(y.rows) + " x " + std::to_string(y.columns) +
                          ", but x W^T is " + std::to_string(x.rows.rows) + " x " +
                          std::to_string(outputs));
    }
    const bool quantised = x.quantised.groups != nullptr;
    const bool dense = !weight.empty() && weight.front()->format().dense();
    const std::int64_t bits = 8 * x.rows.element_size_bytes();
    for (const PackedMatrix* part : weight) {
        const Format& format = part->format();
        if (format.dense() != dense || (dense && (quantised || format.bits != bits))) {
            throw KernelError(
                "a product of " +
                (quantised ? "quantised x" : "x in " + std::to_string(bits) + " bits") +
                " cannot have weights in " + std::string(format.name) +
                (dense ? "" : " beside quantised ones"));
        }
    }
    const std::vector<const PackedMatrix*> parts(weight.begin(), weight.end());
    runtime.perform(y.rows, [&runtime, x, parts, bias, y](std::int64_t rows) {
        multiply_all(runtime, {x.rows.first(rows), x.quantised}, parts, bias, y.first(rows));
    });
}

void lookup(Runtime& runtime, std::span<const std::int64_t> ids, const PackedMatrix& table,
            float scale, std::optional<std::int64_t> first, const Out& y) {
    if (y.columns != table.inputs() || y.rows != static_cast<std::int64_t>(ids.size())) {
        throw KernelError("y is " + std::to_string(y.rows) + " x " + std::to_string(y.columns) +
                          ", but the rows looked up are " + std::to_string(ids.size()) + " x " +
                          std::to_string(table.inputs()));
    }
    if (y.type != Element::f32) throw KernelError("rows of a table are looked up in float32");
    runtime.perform(y.rows, [&runtime, ids, &table, scale, first, y](std::int64_t rows) {
        for (const std::int64_t id : ids.first(static_cast<std::size_t>(rows))) {
            if (!first && (id < 0 || id >= table.outputs())) {
                throw KernelError("row " + std::to_string(id) + " of a table of " +
                                  std::to_string(table.outputs()) + " rows");
            }
        }
        runtime.pool().run(static_cast<int>(rows), [&](int index, int) noexcept {
            auto* const row = static_cast<float*>(y.at(index));
            const std::int64_t id = ids[static_cast<std::size_t>(index)] - first.value_or(0);
            if (id < 0 || id >= table.outputs()) {
                std::fill_n(row, y.columns, 0.0f);
                return;
            }
            table.read_row(id, y.type, row);
            if (scale == 1.0f) return;
            for (std::int64_t at = 0; at < y.columns; ++at) row[at] *= scale;
        });
    });
}

}  // namespace tokenspeed::cpu
