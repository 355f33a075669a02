// How long each row's draft is, so that a step gives the most tokens a second.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

namespace tokenspeed::control {

struct DraftCosts {
    double step_us;   // of the decode rows alone
    double token_us;  // of each drafted token
    // That the step may take for each token that the least of its rows is expected to give.
    std::optional<double> limit_us;
};

// For each row, how much of its draft is worth its time. `chances` [rows][tokens]: that a token and
// all before it are right, falling; each row is a decode row and gives one token for certain. A
// step gives E = rows + the chances of what is drafted and takes T = step + drafted * price: E / T
// grows by a token just if its chance over its price is more than E / T, so that tokens are taken
// in order of falling chance up to the first that is not worth it. No more than `most` in all. O(n
// log rows).
//
// Where that takes longer than the limit, tokens are given up again: the least likely of those that
// the least row does not have, then its own. There are no drafts where none keep it. O(n rows).
std::vector<std::size_t> draft_lengths(std::span<const std::vector<float>> chances,
                                       std::size_t rows, const DraftCosts& costs, std::size_t most);

}  // namespace tokenspeed::control
