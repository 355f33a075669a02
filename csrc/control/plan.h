// The plain values that cross to the execution plane and back; core/step.py says what each holds.
#pragma once

#include <cstdint>
#include <vector>

#include "ids.h"
#include "room.h"

namespace tokenspeed::control {

// Changes of the page table, to be applied in order: table[slot, index] = page.
struct TableDeltas {
    std::vector<std::int32_t> slots;
    std::vector<std::int32_t> indices;
    std::vector<std::int32_t> pages;

    // Makes room, so that as many `add`s cannot fail.
    void reserve(std::size_t more) {
        for (auto* column : {&slots, &indices, &pages}) make_room_for(*column, more);
    }
    void add(SlotId slot, std::size_t index, PageId page) {
        slots.push_back(slot.value);
        indices.push_back(static_cast<std::int32_t>(index));
        pages.push_back(page.value);
    }
};

struct Plan {
    StepId step;
    std::int32_t decode_count;
    std::vector<std::int32_t> row_slots;
    std::vector<std::int32_t> query_starts;
    std::vector<std::int32_t> context_lens;
    std::vector<std::int32_t> token_ids;
    std::vector<std::int32_t> sample_rows;
    std::vector<std::int32_t> sample_positions;
    std::vector<std::int32_t> bound_slots;
    std::vector<std::int64_t> bound_requests;
    std::vector<std::int32_t> kv_slots;
    TableDeltas table;
};

struct Outcome {
    std::vector<std::int64_t> requests;
    std::vector<std::int32_t> tokens;
    std::vector<std::int32_t> sample_indices;
    std::vector<std::int32_t> cached_counts;
    std::vector<std::int64_t> finished;
    std::vector<std::int32_t> reasons;
};

struct Stats {
    std::int64_t running, waiting, waiting_uncached_tokens;
    std::int64_t pages_total, pages_free, pages_cached, pages_active;
    std::int64_t steps, prompt_tokens, cached_tokens, output_tokens, retractions, evictions;
};

}  // namespace tokenspeed::control
