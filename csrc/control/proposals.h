// What a draft model proposes, as it comes back with a step's result and is kept with its request.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tokenspeed::control {

// Tokens that a draft model takes to come after the last one of a request at rest, each with the
// probability that it gives it after those before. It stays with the request until its next launch.
struct Proposal {
    std::vector<std::int32_t> tokens;
    std::vector<float> chances;  // in [0, 1]
};

// All that a step's result proposes: that of row r stands at starts[r] : starts[r + 1]; no starts
// where nothing was proposed.
struct Proposed {
    std::span<const std::int32_t> starts = {};
    std::span<const std::int32_t> tokens = {};
    std::span<const float> chances = {};
    std::int64_t caught_up = 0;  // tokens that the draft model read first
};

}  // namespace tokenspeed::control
