#include "graph.h"

namespace tokenspeed::cpu {

void StepRecording::begin() {
    calls_.clear();
    runtime_.record(&calls_);
}

void StepRecording::end(const std::int64_t* chosen) {
    runtime_.record(nullptr);
    chosen_ = chosen;
}

void StepRecording::run(const DecodePlan& plan, std::span<std::int32_t> tokens) const {
    const std::size_t rows = plan.row_slots.size();
    for (std::size_t row = 0; row < rows; ++row) {
        const std::int32_t slot = plan.row_slots[row];
        inputs_.row_slots[row] = slot;
        inputs_.token_ids[row] = inputs_.last_tokens[slot];
        inputs_.context_lens[row] = plan.context_lens[row];
        inputs_.positions[row] = plan.context_lens[row];
    }
    for (std::size_t index = 0; index < plan.groups.size(); ++index) {
        const DecodePlan::Group& from = plan.groups[index];
        const StepInputs::Group& to = inputs_.groups[index];
        for (std::size_t row = 0; row < rows; ++row) to.kv_slots[row] = from.kv_slots[row];
        for (std::size_t change = 0; change < from.table_slots.size(); ++change) {
            to.page_table[from.table_slots[change] * to.pages_stride + from.table_indices[change]] =
                from.table_pages[change];
        }
    }
    for (const Call& call : calls_) call(static_cast<std::int64_t>(rows));
    for (std::size_t row = 0; row < rows; ++row) {
        inputs_.last_tokens[plan.row_slots[row]] = chosen_[row];
        tokens[row] = static_cast<std::int32_t>(chosen_[row]);
    }
}

}  // namespace tokenspeed::cpu
