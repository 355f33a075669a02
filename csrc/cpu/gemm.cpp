#include "gemm.h"

#include <algorithm>
#include <string>
#include <vector>

#include "errors.h"

namespace tokenspeed::cpu {

namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

// Rows that a few threads quantise are too little work to wake another for.
constexpr std::int64_t elements_per_chunk = 1 << 14;
// What one thread reads in some microseconds; less is not worth the help of another.
constexpr std::int64_t weights_per_chunk_size_bytes = 64 << 10;
// Fewer rows of a part would repeat the unpacking of its weights too often.
constexpr std::int64_t part_rows_min = 64;
// Parts for each thread, so that one which is held up can leave most of its share to others.
constexpr std::int64_t parts_per_thread = 8;

void quantise_all(Runtime& runtime, const Rows<const void*>& x, std::int8_t* values,
                  RowStep* steps) {
    const std::int64_t rows_per_chunk = std::max<std::int64_t>(1, elements_per_chunk / x.columns);
    const std::int64_t element = x.type == Element::f32 ? 4 : 2;
    const auto quantise = [&](int chunk, int) noexcept {
        const std::int64_t end = std::min(x.rows, (chunk + 1) * rows_per_chunk);
        for (std::int64_t row = chunk * rows_per_chunk; row < end; ++row) {
            runtime.kernels().quantise(
                static_cast<const std::byte*>(x.data) + row * x.stride * element, x.type, x.columns,
                values + row * x.columns, steps + row * (x.columns / step_inputs));
        }
    };
    runtime.pool().run(static_cast<int>(ceil_div(x.rows, rows_per_chunk)), quantise);
}

// How a product is cut: a grid of parts, so many panels wide and rows high.
struct Cut {
    std::int64_t panels;
    std::int64_t rows;
};

Cut cut(const Runtime& runtime, std::int64_t rows, std::int64_t panels,
        std::int64_t panel_size_bytes, int threads) {
    const Kernels& kernels = runtime.kernels();
    const std::int64_t at_once = kernels.panels_at_once;
    const std::int64_t wanted = threads == 1 ? 1 : parts_per_thread * threads;
    Cut part{at_once, std::min<std::int64_t>(rows, kernels.rows_at_once)};
    if (rows <= 4) {
        const std::int64_t least = ceil_div(weights_per_chunk_size_bytes, panel_size_bytes);
        part.panels = ceil_div(std::max(ceil_div(panels, wanted), least), at_once) * at_once;
        return part;
    }
    part.panels = std::max(at_once, ceil_div(panels, wanted) / at_once * at_once);
    while (part.rows > part_rows_min &&
           ceil_div(panels, part.panels) * ceil_div(rows, part.rows) < wanted / 2) {
        part.rows = ceil_div(part.rows, 2);
    }
    return part;
}

void multiply(Runtime& runtime, const PackedMatrix& weight, const Product& product) {
    const std::int64_t panels = panel_count(product.outputs);
    const Cut part =
        cut(runtime, product.rows, panels, weight.format().panel_size_bytes(product.inputs),
            runtime.pool().threads());
    const std::int64_t wide = ceil_div(panels, part.panels);
    const std::int64_t high = ceil_div(product.rows, part.rows);
    const auto kernel = runtime.kernels().multiply[weight.format_index()];
    runtime.pool().run(static_cast<int>(wide * high), [&](int chunk, int thread) noexcept {
        // Parts of the same panels follow each other: a thread finds their weights in its cache.
        const std::int64_t panel = chunk / high * part.panels;
        const std::int64_t row = chunk % high * part.rows;
        kernel(product,
               {panel, std::min(panels, panel + part.panels), row,
                std::min(product.rows, row + part.rows)},
               runtime.scratch(thread));
    });
}

// y = x W^T + bias, of operands that fit.
void multiply_all(Runtime& runtime, const In& x, const std::vector<const PackedMatrix*>& weight,
                  const void* bias, const Out& y) {
    if (x.rows == 0) return;
    const auto lease = runtime.lease();
    const auto values_size = static_cast<std::size_t>(x.rows * x.columns);
    std::byte* const memory =
        lease.memory(values_size + values_size / step_inputs * sizeof(RowStep));
    // Inputs come in 32s, so the steps behind the bytes are aligned.
    auto* const values = reinterpret_cast<std::int8_t*>(memory);
    auto* const steps = reinterpret_cast<RowStep*>(memory + values_size);
    quantise_all(runtime, x, values, steps);
    std::int64_t first = 0;
    const std::int64_t element = y.type == Element::f32 ? 4 : 2;
    for (const PackedMatrix* part : weight) {
        const auto* const part_bias = static_cast<const std::byte*>(bias);
        multiply(runtime, *part,
                 {.weights = part->data(),
                  .inputs = part->inputs(),
                  .outputs = part->outputs(),
                  .x = {values, steps},
                  .bias = bias == nullptr ? nullptr : part_bias + first * element,
                  .y = static_cast<std::byte*>(y.data) + first * element,
                  .y_stride = y.stride,
                  .y_type = y.type,
                  .rows = x.rows});
        first += part->outputs();
    }
}

}  // namespace

void linear(Runtime& runtime, const Rows<const void*>& x,
            std::span<const PackedMatrix* const> weight, const void* bias, const Rows<void*>& y) {
    std::int64_t outputs = 0;
    for (const PackedMatrix* part : weight) {
        outputs += part->outputs();
        if (part->inputs() != x.columns) {
            throw KernelError("x has rows of " + std::to_string(x.columns) +
                              " elements, but the weight takes " + std::to_string(part->inputs()));
        }
    }
    if (y.columns != outputs || y.rows != x.rows) {
        throw KernelError("y is " + std::to_string(y.rows) + " x " + std::to_string(y.columns) +
                          ", but x W^T is " + std::to_string(x.rows) + " x " +
                          std::to_string(outputs));
    }
    const std::vector<const PackedMatrix*> parts(weight.begin(), weight.end());
    runtime.perform(x.rows, [&runtime, x, parts, bias, y](std::int64_t rows) {
        multiply_all(runtime, x.first(rows), parts, bias, y.first(rows));
    });
}

void lookup(Runtime& runtime, std::span<const std::int64_t> ids, const PackedMatrix& table,
            const Rows<void*>& y) {
    if (y.columns != table.inputs() || y.rows != static_cast<std::int64_t>(ids.size())) {
        throw KernelError("y is " + std::to_string(y.rows) + " x " + std::to_string(y.columns) +
                          ", but the rows looked up are " + std::to_string(ids.size()) + " x " +
                          std::to_string(table.inputs()));
    }
    for (const std::int64_t id : ids) {
        if (id < 0 || id >= table.outputs()) {
            throw KernelError("row " + std::to_string(id) + " of a table of " +
                              std::to_string(table.outputs()) + " rows");
        }
    }
    runtime.perform(y.rows, [&runtime, ids, &table, y](std::int64_t rows) {
        runtime.pool().run(static_cast<int>(rows), [&](int index, int) noexcept {
            table.read_row(ids[static_cast<std::size_t>(index)], y.type, y.at(index));
        });
    });
}

}  // namespace tokenspeed::cpu
