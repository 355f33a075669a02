#include "draft_lengths.h"

#include <algorithm>
#include <utility>

namespace tokenspeed::control {

std::vector<std::size_t> draft_lengths(std::span<const std::vector<float>> chances,
                                       std::size_t rows, const DraftCosts& costs,
                                       std::size_t most) {
    std::vector<std::size_t> lengths(chances.size());
    // The next token of each row, the likeliest first; of equals the first row's.
    std::vector<std::pair<float, std::size_t>> next;
    next.reserve(chances.size());
    const auto later = [](const auto& a, const auto& b) {
        return a.first != b.first ? a.first < b.first : a.second > b.second;
    };
    for (std::size_t row = 0; row < chances.size(); ++row) {
        if (!chances[row].empty()) next.emplace_back(chances[row].front(), row);
    }
    std::ranges::make_heap(next, later);
    auto expected = static_cast<double>(rows);
    double time_us = costs.step_us;
    for (std::size_t taken = 0; taken < most && !next.empty(); ++taken) {
        std::ranges::pop_heap(next, later);
        const auto [chance, row] = next.back();
        next.pop_back();
        if (chance * time_us <= costs.token_us * expected) break;
        if (costs.limit_us && time_us + costs.token_us > *costs.limit_us) break;
        expected += chance;
        time_us += costs.token_us;
        const std::size_t length = ++lengths[row];
        if (length == chances[row].size()) continue;
        next.emplace_back(chances[row][length], row);
        std::ranges::push_heap(next, later);
    }
    return lengths;
}

}  // namespace tokenspeed::control
