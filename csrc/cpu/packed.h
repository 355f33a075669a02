// A matrix of weights in a native format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "format.h"
#include "kernels.h"
#include "memory.h"
#include "runtime.h"

namespace tokenspeed::cpu {

class PackedMatrix {
  public:
    // Packs a matrix of ggml's blocks (rows of outputs, each a whole number of blocks) on all
    // threads. Nothing is rounded: each block's integers, scales and minima are kept.
    // Throws KernelError: a type without a native format, or `blocks` of another size than
    // `outputs` rows of `inputs` take.
    static PackedMatrix pack(Runtime& runtime, std::string_view ggml_type,
                             std::span<const std::byte> blocks, std::int64_t outputs,
                             std::int64_t inputs);

    // Packs a matrix of dense rows of `inputs` elements on all threads, unchanged.
    // Throws KernelError: no rows, or no inputs.
    static PackedMatrix pack_dense(Runtime& runtime, const In& rows);

    std::int64_t outputs() const { return outputs_; }
    std::int64_t inputs() const { return inputs_; }
    const Format& format() const { return formats[format_index_]; }
    std::size_t format_index() const { return format_index_; }
    const std::byte* data() const { return data_.data(); }
    std::size_t size_bytes() const { return data_.size(); }

    // The weights of one output, computed in float32: `inputs` numbers.
    void read_row(std::int64_t output, Element type, void* row) const;

  private:
    PackedMatrix(std::shared_ptr<Arena> arena, std::size_t format_index, std::int64_t outputs,
                 std::int64_t inputs);

    std::shared_ptr<Arena> arena_;
    std::size_t format_index_;
    std::int64_t outputs_;
    std::int64_t inputs_;
    std::span<std::byte> data_;
};

}  // namespace tokenspeed::cpu
