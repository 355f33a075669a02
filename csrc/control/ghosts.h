// A bounded record of what the cache no longer holds: hashes of removed pages and whose they were.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "hash.h"

namespace tokenspeed::control {

// Remembers the last `entries_max` removed pages by half their hash: a mistake in 2^64 costs a
// wrong statistic. Nothing allocates after the construction; all is O(1).
template <class Owner>
class Ghosts {
  public:
    explicit Ghosts(std::size_t entries_max) : entries_max_(entries_max) {
        entries_.reserve(entries_max);
        table_.resize(std::bit_ceil(2 * entries_max + 1), kNothing);
    }

    void add(const Hash128& hash, const Owner& owner) noexcept {
        if (entries_max_ == 0) return;
        const std::size_t known = place_of(hash.lo);
        if (table_[known] != kNothing) {
            entries_[table_[known]].owner = owner;
            return;
        }
        if (entries_.size() < entries_max_) {
            entries_.push_back({hash.lo, owner});
        } else {
            erase(entries_[oldest_].key);
            entries_[oldest_] = {hash.lo, owner};
        }
        table_[place_of(hash.lo)] = static_cast<std::uint32_t>(oldest_);
        oldest_ = oldest_ + 1 == entries_max_ ? 0 : oldest_ + 1;
    }
    std::optional<Owner> find(const Hash128& hash) const noexcept {
        const std::uint32_t entry = table_[place_of(hash.lo)];
        if (entry == kNothing) return std::nullopt;
        return entries_[entry].owner;
    }

    // For fingerprints: shows each, oldest first.
    template <class Visit>
    void each(Visit&& visit) const {
        for (std::size_t i = 0; i < entries_.size(); ++i) {
            const Entry& entry = entries_[(oldest_ + i) % entries_.size()];
            visit(entry.key, entry.owner);
        }
    }

  private:
    struct Entry {
        std::uint64_t key;
        Owner owner;
    };
    // Open addressing with linear probing, at most half full; the mark of a free place is inside.
    static constexpr std::uint32_t kNothing = ~std::uint32_t{0};
    std::size_t mask() const noexcept { return table_.size() - 1; }
    std::size_t place_of(std::uint64_t key) const noexcept {
        std::size_t place = key & mask();
        while (table_[place] != kNothing && entries_[table_[place]].key != key) {
            place = (place + 1) & mask();
        }
        return place;
    }
    void erase(std::uint64_t key) noexcept {
        std::size_t hole = place_of(key);
        for (std::size_t place = (hole + 1) & mask(); table_[place] != kNothing;
             place = (place + 1) & mask()) {
            const std::size_t wish = entries_[table_[place]].key & mask();
            if (((place - wish) & mask()) >= ((place - hole) & mask())) {
                table_[hole] = table_[place];
                hole = place;
            }
        }
        table_[hole] = kNothing;
    }

    std::size_t entries_max_;
    std::vector<Entry> entries_;
    std::vector<std::uint32_t> table_;
    std::size_t oldest_ = 0;  // where the next entry goes
};

}  // namespace tokenspeed::control
