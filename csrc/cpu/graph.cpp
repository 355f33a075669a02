#include "graph.h"

#include <string>
#include <utility>

#include "errors.h"

namespace tokenspeed::cpu {

StepRecording::StepRecording(Runtime& runtime, StepInputs inputs)
    : runtime_(runtime), inputs_(std::move(inputs)) {
    const StepSize most = inputs_.most();
    if (most.tokens == most.rows || most.tokens == most.samples || most.rows == most.samples) {
        throw KernelError("a step's most tokens, rows and samples must differ");
    }
}

void StepRecording::begin() {
    calls_.clear();
    recorded_.clear();
    runtime_.record(&recorded_);
}

bool StepRecording::end(const Out& logits, std::int64_t* chosen) {
    runtime_.record(nullptr);
    logits_ = logits;
    chosen_ = chosen;
    const StepSize most = inputs_.most();
    for (Call& call : std::exchange(recorded_, {})) {
        std::int64_t StepSize::* count = nullptr;
        for (const auto member : {&StepSize::tokens, &StepSize::rows, &StepSize::samples}) {
            if (call.rows == most.*member) count = member;
        }
        if (count == nullptr) {
            calls_.clear();
            return false;
        }
        calls_.push_back({count, std::move(call.work)});
    }
    return true;
}

void StepRecording::fill(const RecordedPlan& plan) const {
    inputs_.query_starts[0] = 0;
    for (std::size_t row = 0; row < plan.row_slots.size(); ++row) {
        const std::int32_t slot = plan.row_slots[row], context = plan.context_lens[row];
        const std::int32_t begin = plan.query_starts[row], end = plan.query_starts[row + 1];
        inputs_.row_slots[row] = slot;
        inputs_.context_lens[row] = context;
        inputs_.query_starts[row + 1] = end;
        const bool decodes = static_cast<std::int64_t>(row) < plan.decode_count;
        for (auto token = static_cast<std::size_t>(begin); std::cmp_less(token, end); ++token) {
            const bool sampled_before = decodes && std::cmp_equal(token, begin);
            inputs_.token_ids[token] =
                sampled_before ? inputs_.last_tokens[slot] : plan.token_ids[token];
            inputs_.positions[token] = context + static_cast<std::int64_t>(token) - begin;
        }
    }
    std::int64_t of_row = 0;
    for (std::size_t sample = 0; sample < plan.sample_rows.size(); ++sample) {
        const std::int32_t row = plan.sample_rows[sample];
        of_row = sample > 0 && plan.sample_rows[sample - 1] == row ? of_row + 1 : 0;
        inputs_.sampled[sample] = row < plan.decode_count
                                      ? plan.query_starts[static_cast<std::size_t>(row)] + of_row
                                      : plan.query_starts[static_cast<std::size_t>(row) + 1] - 1;
    }
    for (std::size_t index = 0; index < plan.groups.size(); ++index) {
        const RecordedPlan::Group& from = plan.groups[index];
        const StepInputs::Group& to = inputs_.groups[index];
        for (std::size_t token = 0; token < from.kv_slots.size(); ++token) {
            to.kv_slots[token] = from.kv_slots[token];
        }
        for (std::size_t change = 0; change < from.table_slots.size(); ++change) {
            to.page_table[from.table_slots[change] * to.pages_stride + from.table_indices[change]] =
                from.table_pages[change];
        }
    }
}

void StepRecording::run(const RecordedPlan& plan, const std::optional<RecordedSampling>& sampling,
                        std::span<std::int32_t> tokens) const {
    const StepSize most = inputs_.most();
    const StepSize size{std::ssize(plan.token_ids), std::ssize(plan.row_slots),
                        std::ssize(plan.sample_rows)};
    if (size.tokens > most.tokens || size.rows > most.rows || size.samples > most.samples) {
        throw KernelError("a step of " + std::to_string(size.tokens) + " tokens, " +
                          std::to_string(size.rows) + " rows and " + std::to_string(size.samples) +
                          " samples; recorded were " + std::to_string(most.tokens) + ", " +
                          std::to_string(most.rows) + " and " + std::to_string(most.samples));
    }
    fill(plan);
    for (const StepCall& call : calls_) {
        if (const std::int64_t rows = size.*call.count; rows > 0) call.work(rows);
    }
    if (sampling) {
        std::vector<std::int32_t> slots(plan.sample_rows.size());
        for (std::size_t sample = 0; sample < slots.size(); ++sample) {
            slots[sample] = plan.row_slots[static_cast<std::size_t>(plan.sample_rows[sample])];
        }
        sampling->sampler.sample({logits_.first(size.samples), slots, sampling->positions, chosen_},
                                 sampling->reports);
    }
    take_out(plan, tokens);
}

void StepRecording::take_out(const RecordedPlan& plan, std::span<std::int32_t> tokens) const {
    bool counts = false;
    for (std::size_t sample = 0; sample < plan.sample_rows.size(); ++sample) {
        const auto row = static_cast<std::size_t>(plan.sample_rows[sample]);
        if (sample == 0 || plan.sample_rows[sample - 1] != plan.sample_rows[sample]) {
            counts = true;
        } else {
            // The token before was guessed where this one's logits are from.
            const auto guess = static_cast<std::size_t>(inputs_.sampled[sample]);
            counts = counts && chosen_[sample - 1] == inputs_.token_ids[guess];
        }
        if (counts) inputs_.last_tokens[plan.row_slots[row]] = chosen_[sample];
        tokens[sample] = static_cast<std::int32_t>(chosen_[sample]);
    }
}

}  // namespace tokenspeed::cpu
