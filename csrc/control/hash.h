// Chained 128-bit hashes of pages of tokens.
//
// A page's hash covers its own tokens and, through the hash it continues, every token before it.
// Two 64-bit lanes absorb each pair of tokens by a multiplication to 128 bits whose halves are
// folded together; the lanes differ in constant and rotation, so that they collide independently.
// The index compares tokens as well, so a collision costs time and never correctness.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace tokenspeed::control {

struct Hash128 {
    std::uint64_t lo;
    std::uint64_t hi;
    friend bool operator==(const Hash128&, const Hash128&) = default;
};

namespace hashing {

// Odd constants with about as many ones as zeros: fractional bits of square roots of 2, 3, 5, 7.
inline constexpr std::uint64_t kA = 0x6a09e667f3bcc909;
inline constexpr std::uint64_t kB = 0xbb67ae8584caa73b;
inline constexpr std::uint64_t kC = 0x3c6ef372fe94f82b;
inline constexpr std::uint64_t kD = 0xa54ff53a5f1d36f1;

__extension__ using Wide = unsigned __int128;

constexpr std::uint64_t fold(std::uint64_t a, std::uint64_t b) noexcept {
    const Wide product = static_cast<Wide>(a) * b;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

// The old lane is added back, rotated: a factor of zero must not wipe out the history.
constexpr void absorb(Hash128& lanes, std::uint64_t word) noexcept {
    lanes.lo = fold(lanes.lo ^ word, kA) + std::rotl(lanes.lo, 23);
    lanes.hi = fold(lanes.hi ^ std::rotl(word, 32), kB) + std::rotl(lanes.hi, 41);
}

constexpr Hash128 finish(const Hash128& lanes) noexcept {
    return {fold(lanes.lo ^ kC, lanes.hi ^ kA) + lanes.lo,
            fold(lanes.hi ^ kD, std::rotl(lanes.lo, 17) ^ kB) + lanes.hi};
}

}  // namespace hashing

// What the first page of a prompt continues: requests of different salts share nothing.
constexpr Hash128 hash_root(std::uint64_t salt) noexcept {
    Hash128 lanes{hashing::kC, hashing::kD};
    hashing::absorb(lanes, salt);
    return hashing::finish(lanes);
}

constexpr Hash128 hash_page(const Hash128& before, std::span<const std::int32_t> tokens) noexcept {
    Hash128 lanes = before;
    std::size_t i = 0;
    for (; i + 1 < tokens.size(); i += 2) {
        hashing::absorb(lanes, static_cast<std::uint64_t>(static_cast<std::uint32_t>(tokens[i])) |
                                   static_cast<std::uint64_t>(tokens[i + 1]) << 32);
    }
    if (i < tokens.size()) {
        hashing::absorb(lanes, static_cast<std::uint32_t>(tokens[i]));
    }
    hashing::absorb(lanes, tokens.size());
    return hashing::finish(lanes);
}

}  // namespace tokenspeed::control
