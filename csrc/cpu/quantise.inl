// Rows of inputs as bytes: the integer nearest to 127 / largest times the input, where `largest` is
// the largest magnitude of each step of 32, and what a product needs to know of the step.
//
// An input is 32 bits before and 12 after, so whoever computes a row should write it this way,
// rather than let it go through memory twice; a product by itself does it to the rows it is given.

#pragma once

#include "math.inl"

namespace tokenspeed::cpu {
namespace {

constexpr float scale_min = 0x1p-100f;

// Quantises `count` steps from an element on, a lane for each: what concerns a whole step is done
// once for all. `value(at)` gives the vector of elements from `at` on.
template <class Value>
TOKENSPEED_INLINE void quantise_steps(const Value& value, std::int64_t first, int count,
                                      std::byte* values, std::byte* steps,
                                      std::int64_t step_size_bytes) {
    Floats inputs[2][lanes];
    Floats magnitudes[lanes];
    Ints rounded[2][lanes];
    for (int i = 0; i < lanes; ++i) {
        for (int half = 0; half < 2; ++half) {
            inputs[half][i] = i < count ? value(first + (2 * i + half) * lanes) : splat(0.0f);
        }
        magnitudes[i] = max_abs(inputs[0][i], inputs[1][i]);
    }
    const Floats largest = max_of_each(magnitudes);
    // Of inputs smaller than any model's nothing is left, rather than an infinite factor.
    alignas(64) float factors[lanes];
    store(if_at_least(largest, scale_min, div(splat(127.0f), largest)), factors);
    const Floats scale = if_at_least(largest, scale_min, div(largest, splat(127.0f)));
    for (int i = 0; i < lanes; ++i) {
        for (int half = 0; half < 2; ++half) {
            rounded[half][i] = to_ints(mul(inputs[half][i], splat(factors[i])));
            if (i < count) {
                store_bytes(rounded[half][i], reinterpret_cast<std::int8_t*>(
                                                  values + i * step_size_bytes + half * lanes));
            }
        }
    }
    const Ints first_half = sum_of_each(rounded[0]);
    const Ints total = add(first_half, sum_of_each(rounded[1]));
    alignas(64) RowStep row_steps[lanes];
    store_columns(scale, mul(scale, to_floats(total)), sub(splat_ints(0), total),
                  sub(splat_ints(0), first_half), row_steps);
    for (int i = 0; i < count; ++i) {
        __builtin_memcpy(steps + i * step_size_bytes, &row_steps[i], sizeof(RowStep));
    }
}

// Quantises elements [from, to) of a row of so many; both are whole steps.
template <class Value>
TOKENSPEED_INLINE void quantise_row(const Value& value, std::int64_t row, std::int64_t inputs,
                                    std::int64_t from, std::int64_t to, const QuantisedRows& rows) {
    std::byte* const values = rows.values_at(row, inputs);
    std::byte* const steps = rows.steps_at(row, inputs);
    const std::int64_t size = rows.step_size_bytes();
    const std::int64_t end = to / step_inputs;
    std::int64_t step = from / step_inputs;
    for (; step + lanes <= end; step += lanes) {
        quantise_steps(value, step * step_inputs, lanes, values + step * size, steps + step * size,
                       size);
    }
    if (step < end) {
        quantise_steps(value, step * step_inputs, static_cast<int>(end - step),
                       values + step * size, steps + step * size, size);
    }
}

template <Element type>
void quantise(const In& x, std::int64_t row, const QuantisedRows& to) {
    const auto* const from = static_cast<const std::byte*>(x.at(row));
    const auto value = [&](std::int64_t at) __attribute__((always_inline)) {
        // What the next steps will load: the CPU's own prefetchers stop at the end of each page.
        constexpr std::int64_t ahead = lanes * step_inputs;
        __builtin_prefetch(from + (at + ahead) * size_bytes_of(type));
        return load_part(from, type, at, lanes);
    };
    quantise_row(value, row, x.columns, 0, x.columns, to);
}

void quantise(const In& x, std::int64_t row, const QuantisedRows& to) {
    if (x.type == Element::f32) {
        quantise<Element::f32>(x, row, to);
    } else {
        quantise<Element::bf16>(x, row, to);
    }
}

// Writes elements [from, to) of a row, which `value(at, count)` gives a vector at a time: as they
// are, or as bytes.
template <class Value>
TOKENSPEED_INLINE void write_row(const Result& y, std::int64_t row, std::int64_t from,
                                 std::int64_t to, const Value& value) {
    if (y.quantised.groups != nullptr) {
        const auto whole = [&](std::int64_t at) __attribute__((always_inline)) {
            return value(at, std::int64_t{lanes});
        };
        quantise_row(whole, row, y.rows.columns, from, to, y.quantised);
        return;
    }
    void* const elements = y.rows.at(row);
    each_vector(to - from, [&](std::int64_t at, std::int64_t count) {
        store_part(value(from + at, count), elements, y.rows.type, from + at, count);
    });
}

}  // namespace
}  // namespace tokenspeed::cpu
