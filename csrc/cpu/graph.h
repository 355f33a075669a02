// A step as it was recorded: the same kernels on the same memory, run again for another step.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime.h"

namespace tokenspeed::cpu {

// The memory that the recorded kernels read a decode step's inputs from: entry i of each is row
// i's.
struct StepInputs {
    std::int64_t* token_ids;
    std::int64_t* positions;
    std::int32_t* context_lens;
    std::int32_t* row_slots;
    // The last token of each slot.
    std::int64_t* last_tokens;
    struct Group {
        std::int64_t* kv_slots;
        std::int32_t* page_table;
        std::int64_t pages_stride;
    };
    std::vector<Group> groups;
};

// A decode step as the control plane planned it.
struct DecodePlan {
    std::span<const std::int32_t> row_slots;
    std::span<const std::int32_t> context_lens;
    struct Group {
        std::span<const std::int32_t> kv_slots;
        std::span<const std::int32_t> table_slots, table_indices, table_pages;
    };
    std::vector<Group> groups;
};

// Operands are remembered by address: whoever records keeps their memory, and sees to it that
// nothing but kernels of the runtime touches it between inputs and results. Rows of a decode step
// are independent of each other, so what was recorded for some rows can be run for fewer.
class StepRecording {
  public:
    StepRecording(Runtime& runtime, StepInputs inputs)
        : runtime_(runtime), inputs_(std::move(inputs)) {}
    StepRecording(const StepRecording&) = delete;
    StepRecording& operator=(const StepRecording&) = delete;

    // Kernels called on the runtime between these two are recorded instead of run. The last one
    // chooses a token for each row, and writes it where `chosen` says.
    void begin();
    void end(const std::int64_t* chosen);
    std::size_t size() const { return calls_.size(); }

    // Takes a plan's inputs in, runs what was recorded for its rows, and makes the chosen tokens
    // their slots' last; writes them to `tokens`, too.
    void run(const DecodePlan& plan, std::span<std::int32_t> tokens) const;

  private:
    Runtime& runtime_;
    StepInputs inputs_;
    std::vector<Call> calls_;
    const std::int64_t* chosen_ = nullptr;
};

}  // namespace tokenspeed::cpu
