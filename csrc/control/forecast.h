// How long a request will wait before its first step, and so when one that is refused should
// return.
#pragma once

#include <cstdint>
#include <optional>

#include "fair_queue.h"
#include "floor.h"
#include "ids.h"
#include "step_time.h"

namespace tokenspeed::control {

// What stands between a newcomer and its first step.
struct Outlook {
    FairQueue::Backlog backlog;        // those who wait and go before it
    std::int64_t prompts;              // tokens of running prompts still to compute
    StepWork decoding;                 // a step of all who run
    TokenCount longest;                // the longest context among them
    bool full;                         // nobody is given a place before one who runs has ended
    std::optional<TokenCount> answer;  // what an answer is expected to have in all
    TokenCount step_tokens_max;
    TokenCount page_size;
};

// The longer of two waits: for the prompts before it to be computed, at the pace that the floor
// leaves to prompts; and, where all places are taken, for as many answers to end as go before it.
// Nothing while too few steps were seen to tell. Microseconds.
std::optional<std::int64_t> expected_wait_us(const Outlook& outlook, const StepTimeModel& model,
                                             const Floor& floor) noexcept;

}  // namespace tokenspeed::control
