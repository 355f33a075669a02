// Philox4x32-10, the counter-based generator behind every draw (Salmon et al. 2011, section 3.3):
// the same numbers as `tokenspeed.execution.philox` has.
#pragma once

#include <cmath>
#include <cstdint>

namespace tokenspeed::cpu {

// A number within (0, 1), which depends on a request's seed and on which of its tokens it is for.
inline double uniform(std::uint64_t seed, std::uint32_t position) {
    constexpr std::uint64_t multipliers[2] = {0xD2511F53, 0xCD9E8D57};
    constexpr std::uint32_t key_steps[2] = {0x9E3779B9, 0xBB67AE85};
    std::uint32_t words[4] = {position, 0, 0, 0};
    std::uint32_t keys[2] = {static_cast<std::uint32_t>(seed),
                             static_cast<std::uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t first = multipliers[0] * words[0], second = multipliers[1] * words[2];
        const std::uint32_t next[4] = {
            static_cast<std::uint32_t>(second >> 32) ^ words[1] ^ keys[0],
            static_cast<std::uint32_t>(second),
            static_cast<std::uint32_t>(first >> 32) ^ words[3] ^ keys[1],
            static_cast<std::uint32_t>(first)};
        for (int word = 0; word < 4; ++word) words[word] = next[word];
        keys[0] += key_steps[0];
        keys[1] += key_steps[1];
    }
    // 52 bits leave room for the half that keeps both ends out without rounding.
    const std::uint64_t bits = std::uint64_t{words[0] >> 6} << 26 | words[1] >> 6;
    return std::ldexp(static_cast<double>(bits) + 0.5, -52);
}

}  // namespace tokenspeed::cpu
