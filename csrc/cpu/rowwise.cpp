#include "rowwise.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "elements.h"
#include "errors.h"
#include "quantise.h"

namespace tokenspeed::cpu {

namespace {

// Rows that a thread is done with in some microseconds are too little work to wake another for.
constexpr std::int64_t elements_per_chunk = 1 << 14;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

// Rows of a chunk, of which `together` belong together.
std::int64_t rows_at_once(std::int64_t columns, std::int64_t together) {
    const std::int64_t elements = std::max<std::int64_t>(1, columns * together);
    return std::max<std::int64_t>(1, elements_per_chunk / elements) * together;
}

// Does work(row) for each row.
template <class Work>
void each_row(Runtime& runtime, std::int64_t rows, std::int64_t columns, const Work& work,
              std::int64_t together = 1) {
    const std::int64_t at_once = rows_at_once(columns, together);
    const std::int64_t chunks = ceil_div(rows, at_once);
    runtime.pool().run(static_cast<int>(chunks), [&](int chunk, int) noexcept {
        const std::int64_t end = std::min(rows, (chunk + 1) * at_once);
        for (std::int64_t row = chunk * at_once; row < end; ++row) work(row);
    });
}

std::string shape(const auto& rows) {
    return std::to_string(rows.rows) + " x " + std::to_string(rows.columns);
}

void expect_same(const auto& a, const auto& b, const char* names) {
    if (a.rows != b.rows || a.columns != b.columns) {
        throw KernelError(std::string(names) + " must have one shape, but are " + shape(a) +
                          " and " + shape(b));
    }
}

// A result's place in a call with so many rows; the last group of quantised ones is filled up.
Result result_of(const Runtime& runtime, const Result& y, std::int64_t rows) {
    if (y.quantised.groups == nullptr) return y;
    const QuantisedRows quantised = quantised_rows(runtime.kernels(), y.quantised.groups, rows);
    fill_up(quantised, rows, y.rows.columns);
    return {y.rows, quantised};
}

// Rows that only one thread may write to: they lie in the same lines.
std::int64_t rows_together(const Result& y) {
    return y.quantised.groups == nullptr ? 1 : y.quantised.group_rows;
}

}  // namespace

void add_rms_norm(Runtime& runtime, const AddRmsNorm& call) {
    expect_same(call.x, call.y.rows, "x and its norm");
    if (call.residual.data != nullptr) expect_same(call.x, call.residual, "x and the residual");
    if (call.stream.data != nullptr) expect_same(call.x, call.stream, "x and the sum");
    runtime.perform(call.x.rows, [&runtime, call](std::int64_t rows) {
        AddRmsNorm now = call;
        now.y = result_of(runtime, call.y, rows);
        each_row(
            runtime, rows, call.x.columns,
            [&](std::int64_t row) { runtime.kernels().add_rms_norm(now, row); },
            rows_together(now.y));
    });
}

void gate(Runtime& runtime, const Gated& call) {
    const Out& y = call.y.rows;
    if (call.x.rows != y.rows || call.x.columns != 2 * y.columns) {
        throw KernelError("gates and ups of " + shape(call.x) + " do not give " + shape(y));
    }
    runtime.perform(call.x.rows, [&runtime, call](std::int64_t rows) {
        Gated now = call;
        now.y = result_of(runtime, call.y, rows);
        const std::int64_t together = rows_together(now.y), features = call.y.rows.columns;
        // Rows that lie together are cut into stretches of features instead.
        const std::int64_t pieces =
            ceil_div(2 * features * std::min(rows, together), elements_per_chunk);
        const std::int64_t wide =
            ceil_div(ceil_div(features, std::max<std::int64_t>(1, pieces)), gate_features) *
            gate_features;
        const std::int64_t across = ceil_div(features, std::max<std::int64_t>(1, wide));
        const std::int64_t high = across > 1 ? together : rows_at_once(2 * features, together);
        runtime.pool().run(
            static_cast<int>(ceil_div(rows, high) * across), [&](int chunk, int) noexcept {
                const std::int64_t from = chunk % across * wide;
                const std::int64_t end = std::min(rows, (chunk / across + 1) * high);
                for (std::int64_t row = chunk / across * high; row < end; ++row) {
                    runtime.kernels().gate(now, row, from, std::min(features, from + wide));
                }
            });
    });
}

void rotate(Runtime& runtime, const Rotation& call) {
    expect_same(call.x, call.y, "heads and rotated heads");
    runtime.perform(call.x.rows, [&runtime, call](std::int64_t rows) {
        each_row(runtime, rows, call.x.columns,
                 [&](std::int64_t row) { runtime.kernels().rotate(call, row); });
    });
}

void angles(Runtime& runtime, std::span<const std::int64_t> positions,
            std::span<const float> frequencies, float length, float* cosines, float* sines) {
    const auto count = static_cast<std::int64_t>(frequencies.size());
    runtime.perform(static_cast<std::int64_t>(positions.size()), [=, &runtime](std::int64_t rows) {
        // A sine takes as long as some ten elements elsewhere.
        each_row(runtime, rows, 10 * count, [&](std::int64_t row) {
            const auto position = static_cast<float>(positions[static_cast<std::size_t>(row)]);
            for (std::int64_t at = 0; at < count; ++at) {
                const float angle = position * frequencies[static_cast<std::size_t>(at)];
                cosines[row * count + at] = static_cast<float>(std::cos(double{angle})) * length;
                sines[row * count + at] = static_cast<float>(std::sin(double{angle})) * length;
            }
        });
    });
}

void add(Runtime& runtime, const In& a, const In& b, const Out& y) {
    expect_same(a, b, "both sides of a sum");
    expect_same(a, y, "a sum and its sides");
    runtime.perform(y.rows, [&runtime, a, b, y](std::int64_t rows) {
        each_row(runtime, rows, y.columns, [&](std::int64_t row) {
            for (std::int64_t at = 0; at < y.columns; ++at) {
                store_element(y, row, at, element_of(a, row, at) + element_of(b, row, at));
            }
        });
    });
}

void join(Runtime& runtime, const In& a, const In& b, std::int64_t heads, const Out& y) {
    if (a.rows != b.rows || a.rows != y.rows || a.columns + b.columns != y.columns || heads < 1 ||
        a.columns % heads != 0 || b.columns % heads != 0 || a.type != b.type || a.type != y.type) {
        throw KernelError(shape(a) + " and " + shape(b) + " in " + std::to_string(heads) +
                          " heads do not give " + shape(y) + " of the same type");
    }
    runtime.perform(y.rows, [&runtime, a, b, heads, y](std::int64_t rows) {
        const std::int64_t element = y.element_size_bytes();
        const auto front = static_cast<std::size_t>(a.columns / heads * element);
        const auto behind = static_cast<std::size_t>(b.columns / heads * element);
        each_row(runtime, rows, y.columns, [&](std::int64_t row) {
            const auto* from_a = static_cast<const std::byte*>(a.at(row));
            const auto* from_b = static_cast<const std::byte*>(b.at(row));
            auto* to = static_cast<std::byte*>(y.at(row));
            for (std::int64_t head = 0; head < heads; ++head) {
                std::memcpy(to, from_a, front);
                std::memcpy(to + front, from_b, behind);
                from_a += front;
                from_b += behind;
                to += front + behind;
            }
        });
    });
}

void take(Runtime& runtime, const In& x, std::span<const std::int64_t> indices, const Out& y) {
    if (y.rows != static_cast<std::int64_t>(indices.size()) || y.columns != x.columns ||
        y.type != x.type) {
        throw KernelError(std::to_string(indices.size()) + " rows of " + shape(x) +
                          " do not give " + shape(y) + " of the same type");
    }
    runtime.perform(y.rows, [&runtime, x, indices, y](std::int64_t rows) {
        for (const std::int64_t index : indices.first(static_cast<std::size_t>(rows))) {
            if (index < 0 || index >= x.rows) {
                throw KernelError("row " + std::to_string(index) + " of " + shape(x));
            }
        }
        const auto size = static_cast<std::size_t>(x.columns * x.element_size_bytes());
        each_row(runtime, rows, x.columns, [&](std::int64_t row) {
            std::memcpy(y.at(row), x.at(indices[static_cast<std::size_t>(row)]), size);
        });
    });
}

}  // namespace tokenspeed::cpu
