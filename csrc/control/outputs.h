// How long answers get, from how long they were; and the room that growth will take.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "ids.h"

namespace tokenspeed::control {

// The lengths of the last answers that came to their end.
class OutputHistory {
  public:
    void add(TokenCount outputs) noexcept;

    // What an answer of `so_far` tokens that may have `most` is going to have in all: the mean of
    // those in memory that were longer. Nothing while too few are known.
    std::optional<TokenCount> expected(TokenCount so_far, TokenCount most) const noexcept;

  private:
    static constexpr std::size_t kMemory = 128;
    static constexpr std::size_t kEnough = 8;
    std::array<std::int32_t, kMemory> recent_{};  // a ring, in order of arrival
    std::array<std::int32_t, kMemory> sorted_{};  // the same, ascending
    std::size_t count_ = 0;
    std::size_t oldest_ = 0;
};

// A request that holds pages, and what is still to come of it.
struct Growth {
    TokenCount remaining;  // tokens to come
    PageCount owned;       // pages it holds now that others can have when it ends
};

// The most pages that all of them together will need beyond those they hold, at any time until the
// last has ended, if each gets a token a step: pages of those that end serve those that go on.
// (The peak of future memory of Gong et al., "Past-Future Scheduler for LLM Serving", ASPLOS 2025.)
// Counts tokens, not pages begun. Sorts the requests; O(n log n).
PageCount peak_growth(std::span<Growth> requests, TokenCount page_size) noexcept;

}  // namespace tokenspeed::control
