#include "forecast.h"

#include <algorithm>

namespace tokenspeed::control {

std::optional<std::int64_t> expected_wait_us(const Outlook& outlook, const StepTimeModel& model,
                                             const Floor& floor) noexcept {
    if (!model.trusted()) return std::nullopt;
    const auto running = static_cast<double>(outlook.decoding.decode_rows);
    StepWork step = outlook.decoding;
    const TokenCount most(
        std::max(outlook.step_tokens_max.value - static_cast<std::int32_t>(step.decode_rows), 1));
    // A prompt half computed stands for all of them.
    const TokenCount context(outlook.longest.value / 2);
    TokenCount chunk =
        floor.chunk(model, step, outlook.longest, 1.0, context, most, outlook.page_size);
    double steps_for_a_chunk = 1.0;
    if (chunk == TokenCount(0)) {
        chunk = outlook.page_size;
        steps_for_a_chunk = Floor::kPatience;
    }
    const double decode_us = model.predict_us(step);
    step.add_chunk(context, chunk);
    const double step_us = model.predict_us(step);
    const double chunks =
        (outlook.backlog.tokens + static_cast<double>(outlook.prompts)) / chunk.value;
    double wait_us = chunks * (step_us + (steps_for_a_chunk - 1.0) * decode_us);

    if (outlook.full && running > 0 && outlook.answer) {
        // Answers end evenly: one of `running` in each such part of an answer's time.
        const double between_us = outlook.answer->value * decode_us / running;
        wait_us = std::max(wait_us, (outlook.backlog.requests + 1.0) * between_us);
    }
    return static_cast<std::int64_t>(std::min(wait_us, 1e15));
}

}  // namespace tokenspeed::control
