// How many prompts of whatever salt open with a page of given tokens: counted, never looked up.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "hash.h"

namespace tokenspeed::control {

// Only what an operator may see comes of it: that a salt, and nothing else, kept a prompt from
// cached content. A count-min sketch (G. Cormode, S. Muthukrishnan, J. Algorithms 55(1), 2005):
// fixed memory, and a query takes the same time whatever others sent. It may count too many,
// seldom, never too few.
class Openings {
  public:
    Openings() : counts_(2 * kWidth) {}

    void add(std::span<const std::int32_t> tokens) noexcept {
        for (const std::size_t place : places(tokens)) ++counts_[place];
    }
    void remove(std::span<const std::int32_t> tokens) noexcept {
        for (const std::size_t place : places(tokens)) --counts_[place];
    }
    bool contains(std::span<const std::int32_t> tokens) const noexcept {
        const auto [a, b] = places(tokens);
        return std::min(counts_[a], counts_[b]) > 0;
    }

  private:
    static constexpr std::size_t kWidth = std::size_t{1} << 15;
    static std::array<std::size_t, 2> places(std::span<const std::int32_t> tokens) noexcept {
        const Hash128 hash = hash_page(hash_root(0), tokens);
        return {hash.lo % kWidth, kWidth + hash.hi % kWidth};
    }
    std::vector<std::uint32_t> counts_;
};

}  // namespace tokenspeed::control
