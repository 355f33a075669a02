#include "rowwise.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "errors.h"

namespace tokenspeed::cpu {

namespace {

// Rows that a thread is done with in some microseconds are too little work to wake another for.
constexpr std::int64_t elements_per_chunk = 1 << 14;

// Does work(row) for each row.
template <class Work>
void each_row(Runtime& runtime, std::int64_t rows, std::int64_t columns, const Work& work) {
    const std::int64_t at_once =
        std::max<std::int64_t>(1, elements_per_chunk / std::max<std::int64_t>(1, columns));
    const std::int64_t chunks = (rows + at_once - 1) / at_once;
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

}  // namespace

void add_rms_norm(Runtime& runtime, const AddRmsNorm& call) {
    expect_same(call.x, call.y, "x and its norm");
    if (call.residual.data != nullptr) expect_same(call.x, call.residual, "x and the residual");
    if (call.stream.data != nullptr) expect_same(call.x, call.stream, "x and the sum");
    runtime.perform(call.x.rows, [&runtime, call](std::int64_t rows) {
        each_row(runtime, rows, call.x.columns,
                 [&](std::int64_t row) { runtime.kernels().add_rms_norm(call, row); });
    });
}

void gate(Runtime& runtime, const Gated& call) {
    if (call.x.rows != call.y.rows || call.x.columns != 2 * call.y.columns) {
        throw KernelError("gates and ups of " + shape(call.x) + " do not give " + shape(call.y));
    }
    runtime.perform(call.x.rows, [&runtime, call](std::int64_t rows) {
        each_row(runtime, rows, call.x.columns,
                 [&](std::int64_t row) { runtime.kernels().gate(call, row); });
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
            std::span<const float> frequencies, float* cosines, float* sines) {
    const auto count = static_cast<std::int64_t>(frequencies.size());
    runtime.perform(static_cast<std::int64_t>(positions.size()), [=, &runtime](std::int64_t rows) {
        // A sine takes as long as some ten elements elsewhere.
        each_row(runtime, rows, 10 * count, [&](std::int64_t row) {
            const auto position = static_cast<float>(positions[static_cast<std::size_t>(row)]);
            for (std::int64_t at = 0; at < count; ++at) {
                const float angle = position * frequencies[static_cast<std::size_t>(at)];
                cosines[row * count + at] = static_cast<float>(std::cos(double{angle}));
                sines[row * count + at] = static_cast<float>(std::sin(double{angle}));
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
