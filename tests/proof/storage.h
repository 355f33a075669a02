// What one cache group of a simulated device holds: cells of (value, position, salt) by page, on
// the device and on the host, and the page table built from the plans' deltas.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <span>
#include <vector>

#include "fingerprint.h"
#include "plan.h"

namespace tokenspeed::proof {

// What a request should read: its prompt, and then the tokens it gets.
struct History {
    std::uint64_t salt;
    std::size_t prompt;
    std::span<const std::int32_t> tokens;
    std::span<const std::uint64_t> states;  // of a recurrence, after so many tokens
    bool foreseen;  // ends by its length: nothing needs to be computed past the end
};

// The state of a recurrence that is fed one more token.
std::uint64_t follow(std::uint64_t state, std::int32_t token) noexcept;

// One request's part of a step: it feeds `tokens`, from position `start` on.
struct Row {
    std::int32_t slot;
    std::int64_t request;
    std::int32_t start;
    std::vector<std::int32_t> tokens;
    History history;
    std::int32_t doubtful = 0;  // of the tokens, the last ones that are wrong guesses

    // Behind what is its request's own.
    std::int32_t sure_end() const { return end() - doubtful; }
    std::int32_t end() const { return start + static_cast<std::int32_t>(tokens.size()); }
};

class Storage {
  public:
    struct Sizes {
        std::int32_t page_size;
        std::int32_t slots_max;
        std::int32_t context_max;
    };

    Storage(const control::GroupConfig& group, const Sizes& sizes);
    control::GroupKind kind() const { return group_.kind; }

    // A request takes the slot: what was there means nothing to it.
    void bind(std::int32_t slot) { table_[index(slot)].clear(); }
    // Each throws Wrong where what it does would be seen by anybody it should not be seen by.
    void begin(const control::GroupPlan& plan, const control::Transfers& transfers);
    void write(std::span<const Row> rows, std::span<const std::int32_t> kv_slots);
    void read(std::span<const Row> rows);
    void end(const control::GroupPlan& plan);
    void retire() { flights_.pop_front(); }

    // The transfer is over: copies what it loads, writes what it receives, checks what it sends.
    void transferred(std::int64_t transfer, control::TransferKind kind, bool complete,
                     const History& history, std::int32_t known);

    void scribble(const control::Fingerprint& live);
    void describe(control::Fingerprint& fingerprint) const;
    // The page table of a slot of which `fed` positions are written.
    void describe(const control::Fingerprint& names, std::int32_t slot, std::int32_t fed,
                  std::vector<std::int64_t>& words) const;

  private:
    struct Cell {
        std::uint64_t value;
        std::int64_t position;  // of a recurrence, the tokens it was fed
        std::uint64_t salt;
        friend bool operator==(const Cell&, const Cell&) = default;
    };
    // An entry of a page table, and up to where its content was last found right.
    struct Entry {
        std::int32_t page;
        std::int32_t right;
        std::uint64_t version;
    };
    // A page that a transfer moves, and its versions when that began.
    struct Cargo {
        std::int32_t elsewhere;
        std::int32_t page;
        std::uint64_t version;
        std::uint64_t host_version;
    };
    // Pages of one tier.
    struct Pool {
        std::vector<Cell> cells;
        std::vector<std::uint64_t> versions;  // by page
    };

    static std::size_t index(std::int32_t value) { return static_cast<std::size_t>(value); }
    bool paged() const { return group_.kind != control::GroupKind::kRecurrent; }
    std::int32_t first_seen(std::int32_t start) const;
    std::span<Cell> cells(Pool& pool, std::int32_t page) const;
    std::span<const Cell> cells(const Pool& pool, std::int32_t page) const;
    void touch(Pool& pool, std::int32_t page) { pool.versions[index(page)] = ++writes_; }
    void blank(Pool& pool, std::int32_t page);
    void copy(Pool& from, std::int32_t source, Pool& to, std::int32_t target);
    void expect_page(const Pool& pool, std::int32_t page) const;
    // That no step in flight has it for another request, and no transfer moves it.
    void expect_writable(std::int32_t page, std::int64_t request) const;
    void note_reader(std::int32_t page, std::int64_t request);
    Entry& entry(const Row& row, std::size_t place);
    void write_positions(const Row& row, std::span<const std::int32_t> kv_slots);
    void write_state(const Row& row);
    void claim(std::int32_t page, std::int64_t request);
    void check(const Row& row, Entry& entry, std::int32_t from, std::int32_t wanted) const;

    control::GroupConfig group_;
    Sizes sizes_;
    std::int32_t cells_each_;
    Pool device_, host_;
    std::uint64_t writes_ = 0;
    std::vector<std::vector<Entry>> table_;          // by slot
    std::deque<std::vector<std::int64_t>> flights_;  // by step in flight: who reads a page
    std::vector<std::int64_t> writers_;              // by page, of the step being launched
    std::map<std::int64_t, std::vector<Cargo>> transfers_;
    std::map<std::int32_t, std::int64_t> moving_;  // pages of the device that a transfer writes
};

}  // namespace tokenspeed::proof
