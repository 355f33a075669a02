// A step as it was recorded: the same kernels on the same memory, run again for another step.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "runtime.h"
#include "sampler.h"

namespace tokenspeed::cpu {

// How much of each a step has: tokens, rows, and tokens whose logits are wanted.
struct StepSize {
    std::int64_t tokens, rows, samples;
};

// The memory that the recorded kernels read a step's inputs from.
struct StepInputs {
    std::span<std::int64_t> token_ids;
    std::int64_t* positions;
    std::int32_t* query_starts;  // one more than rows
    std::span<std::int32_t> context_lens;
    std::int32_t* row_slots;
    std::span<std::int64_t> sampled;
    // The last token of each slot.
    std::int64_t* last_tokens;
    struct Group {
        std::int64_t* kv_slots;
        std::int32_t* page_table;
        std::int64_t pages_stride;
    };
    std::vector<Group> groups;

    StepSize most() const {
        return {std::ssize(token_ids), std::ssize(context_lens), std::ssize(sampled)};
    }
};

// A step as the control plane planned it. The first `decode_count` rows run the last token of their
// slots and then their drafts, and stand in `sample_rows` once for each of their tokens; other rows
// stand there once, if at all, for their last.
struct RecordedPlan {
    std::int64_t decode_count;
    std::span<const std::int32_t> row_slots, query_starts, context_lens, token_ids, sample_rows;
    struct Group {
        std::span<const std::int32_t> kv_slots;
        std::span<const std::int32_t> table_slots, table_indices, table_pages;
    };
    std::vector<Group> groups;
};

// What chooses a step's tokens where they are not to be the likeliest.
struct RecordedSampling {
    Sampler& sampler;
    // Of each sample, which of its request's output tokens it is.
    std::span<const std::int32_t> positions;
    Reports reports;
};

// Operands are remembered by address: whoever records keeps their memory, and sees to it that
// nothing but kernels of the runtime touches it between inputs and results. What a kernel is called
// for while recording says what its work grows with: a step's tokens, its rows or its samples. So
// no two of these may have the same greatest number, and what was recorded for the greatest can be
// run for fewer.
class StepRecording {
  public:
    // Throws KernelError: greatest numbers that are equal.
    StepRecording(Runtime& runtime, StepInputs inputs);
    StepRecording(const StepRecording&) = delete;
    StepRecording& operator=(const StepRecording&) = delete;

    // Kernels called on the runtime between these two are recorded instead of run. The last one
    // chooses the likeliest token of each sample's logits, and writes it where `chosen` says.
    // `end` is false, and keeps nothing, where a kernel was called for another number of rows.
    void begin();
    bool end(const Out& logits, std::int64_t* chosen);
    std::size_t size() const { return calls_.size(); }

    // Takes a plan's inputs in, runs what was recorded for its sizes, lets the sampler choose where
    // there is one, and writes the chosen tokens to `tokens`. The last one of a row that counts
    // becomes its slot's last: one counts if those of the row before it are what the row's draft
    // guessed. Throws KernelError: more of something than was recorded for, or what a kernel
    // throws.
    void run(const RecordedPlan& plan, const std::optional<RecordedSampling>& sampling,
             std::span<std::int32_t> tokens) const;

  private:
    void fill(const RecordedPlan& plan) const;
    void take_out(const RecordedPlan& plan, std::span<std::int32_t> tokens) const;

    Runtime& runtime_;
    StepInputs inputs_;
    std::vector<Call> recorded_;
    struct StepCall {
        std::int64_t StepSize::* count;
        Call::Work work;
    };
    std::vector<StepCall> calls_;
    Out logits_{};
    std::int64_t* chosen_ = nullptr;
};

}  // namespace tokenspeed::cpu
