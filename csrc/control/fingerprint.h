// What a scheduler will do, with everything that cannot matter taken out: the numbers of pages and
// slots, of steps and transfers long gone, of releases long past.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <vector>

#include "groups.h"
#include "ids.h"
#include "proposals.h"

namespace tokenspeed::control {

// `words` names pages and slots by their places in the lists here, which are in the order in which
// the state mentions them: states that differ by a renaming are the same. A page that is not listed
// holds nothing that may be read.
struct Fingerprint {
    std::vector<std::int64_t> words;
    std::array<std::vector<std::int32_t>, kGroupKinds> pages;       // by group, of the device
    std::array<std::vector<std::int32_t>, kGroupKinds> host_pages;  // by group
    std::vector<SlotId> slots;

    void add(const std::vector<std::int32_t>& tokens) {
        words.push_back(static_cast<std::int64_t>(tokens.size()));
        words.insert(words.end(), tokens.begin(), tokens.end());
    }
    void add(const Proposal& proposal) {
        add(proposal.tokens);
        for (const float chance : proposal.chances) {
            words.push_back(std::bit_cast<std::int32_t>(chance));
        }
    }
};

}  // namespace tokenspeed::control
