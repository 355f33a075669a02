#include "draft_lengths.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace tokenspeed::control {

namespace {

// Gives up tokens until a step of `time_us` keeps the limit.
void keep_limit(std::vector<std::size_t>& lengths, std::span<const std::vector<float>> chances,
                std::size_t rows, const DraftCosts& costs, double time_us) {
    std::vector<double> expected(lengths.size());
    for (std::size_t row = 0; row < lengths.size(); ++row) {
        expected[row] =
            std::accumulate(chances[row].begin(),
                            chances[row].begin() + static_cast<std::ptrdiff_t>(lengths[row]), 1.0);
    }
    for (;;) {
        // Rows without a draft give one token.
        const auto lowest = std::ranges::min_element(expected);
        const double least = expected.size() < rows || lowest == expected.end() ? 1.0 : *lowest;
        if (time_us <= *costs.limit_us * least) return;
        std::optional<std::size_t> dropped;
        for (const bool even_least : {false, true}) {
            for (std::size_t row = 0; row < lengths.size() && (!dropped || !even_least); ++row) {
                if (lengths[row] == 0) continue;
                const float chance = chances[row][lengths[row] - 1];
                if (!even_least && expected[row] - chance < least) continue;
                if (!dropped || chance < chances[*dropped][lengths[*dropped] - 1]) dropped = row;
            }
            if (dropped) break;
        }
        if (!dropped) return;
        expected[*dropped] -= chances[*dropped][--lengths[*dropped]];
        time_us -= costs.token_us;
    }
}

}  // namespace

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
        expected += chance;
        time_us += costs.token_us;
        const std::size_t length = ++lengths[row];
        if (length == chances[row].size()) continue;
        next.emplace_back(chances[row][length], row);
        std::ranges::push_heap(next, later);
    }
    if (costs.limit_us) keep_limit(lengths, chances, rows, costs, time_us);
    return lengths;
}

}  // namespace tokenspeed::control
