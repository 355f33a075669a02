// The plain values that cross to the execution plane and back; core/step.py says what each holds.
#pragma once

#include <cstdint>
#include <vector>

#include "groups.h"
#include "ids.h"
#include "room.h"
#include "transfers.h"

namespace tokenspeed::control {

// Changes of a page table, to be applied in order: table[slot, index] = page.
struct TableDeltas {
    std::vector<std::int32_t> slots;
    std::vector<std::int32_t> indices;
    std::vector<std::int32_t> pages;

    // Makes room, so that as many `add`s cannot fail.
    void reserve(std::size_t more) {
        for (auto* column : {&slots, &indices, &pages}) make_room_for(*column, more);
    }
    void add(SlotId slot, std::size_t index, std::int32_t page) {
        slots.push_back(slot.value);
        indices.push_back(static_cast<std::int32_t>(index));
        pages.push_back(page);
    }
};

// Pages to be copied, one to one.
struct Moves {
    std::vector<std::int32_t> sources;
    std::vector<std::int32_t> targets;

    void reserve(std::size_t more) {
        for (auto* column : {&sources, &targets}) make_room_for(*column, more);
    }
    void add(std::int32_t source, std::int32_t target) {
        sources.push_back(source);
        targets.push_back(target);
    }
};

// Pages that transfers move: what a transfer reads or writes elsewhere, and the page here.
struct Cargo {
    std::vector<std::int32_t> transfers;  // which of the plan's transfers
    std::vector<std::int32_t> elsewhere;  // a page of the host, or an index in the request
    std::vector<std::int32_t> pages;

    void reserve(std::size_t more) {
        for (auto* column : {&transfers, &elsewhere, &pages}) make_room_for(*column, more);
    }
    void add(std::int32_t transfer, std::int32_t other, std::int32_t page) {
        transfers.push_back(transfer);
        elsewhere.push_back(other);
        pages.push_back(page);
    }
};

// One cache group's part of a plan.
struct GroupPlan {
    GroupKind kind;
    std::vector<std::int32_t> kv_slots;
    TableDeltas table;
    Moves stores;
    Moves copies;
    Moves saves;
    Cargo loads;
    Cargo handovers;
};

struct Transfers {
    std::vector<std::int64_t> ids;
    std::vector<std::int64_t> requests;
    std::vector<std::int32_t> kinds;
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
    std::vector<std::int32_t> propose_counts;
    std::vector<std::int32_t> bound_slots;
    std::vector<std::int64_t> bound_requests;
    Transfers transfers;
    std::vector<GroupPlan> groups;
};

// A row's draft of which a step ran no more than the first guesses.
struct CutDraft {
    std::int32_t slot;
    std::int32_t guesses;
};

inline constexpr std::size_t kReportColumns = 5;

struct Outcome {
    std::vector<std::int64_t> requests;
    std::vector<std::int32_t> tokens;
    std::vector<std::int32_t> sample_indices;
    std::vector<std::int32_t> cached_counts;
    std::vector<std::int64_t> finished;
    std::vector<std::int32_t> reasons;
    // Requests that took a slot for the first time, and where their prompts came from.
    std::vector<std::int64_t> admitted;
    std::vector<std::int32_t> reports;        // kReportColumns for each: see core.step.CacheReport
    std::vector<std::int32_t> retries_ms;     // when to come back, for those refused; else 0
    std::vector<std::int32_t> draft_reports;  // of each finished: tokens drafted, and accepted
};

struct Stats {
    std::int64_t running, waiting, parked, transferring, waiting_uncached_tokens;
    std::int64_t pages_total, pages_free, pages_cached, pages_active;
    std::int64_t host_pages_total, host_pages_cached;
    std::int64_t steps, prompt_tokens, cached_tokens, output_tokens, missed_evicted_tokens,
        missed_unseen_tokens, missed_other_salt_tokens, missed_tail_tokens, retractions, parkings;
    std::int64_t drafted_tokens, accepted_tokens, proposed_tokens, draft_memory_size_bytes;
    std::int64_t evictions, stores, loads, refusals;
};

}  // namespace tokenspeed::control
