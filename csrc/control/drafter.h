// Drafts out of what was read and written before: the longest suffix of a request that was there
// earlier says what comes next.
//
// After SuffixDecoding (Oliaro et al., 2024) and prompt lookup (Saxena, 2023): agents quote files,
// write code again with edits and copy what tools print. Each request has an automaton of its
// prompt and output, which takes up so many tokens a plan over all requests that none pays for a
// long prompt at once; a draft is made once it has caught up. When the request ends the automaton
// is kept, and serves the next turn: a prompt of the same tenant and salt that begins with what it
// holds, or with half of it, goes on from there. What it holds of another ending does no harm. Of
// all that is kept the least recently used goes first when memory runs out. Beside these there is
// an automaton for each tenant and salt that all its requests share, of what they wrote until they
// ended, in two generations: when the young one is full, the old one is dropped. It is asked where
// it matches more than the request's own.
//
// How likely a token is follows from how long a match it continues. That is learned from every
// token that is sampled, drafted or not: for each, the match before it said what would come, and
// was right or wrong. So text without repetition is known as such without a draft. A request that
// has shown little is taken to be like the others. Where a draft model proposed something as well,
// the draft is whichever more tokens are expected of.
#pragma once

#include <array>
#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "draft_source.h"
#include "proposer.h"
#include "suffix_automaton.h"

namespace tokenspeed::control {

// How often matches of a length said what came next.
class MatchRecord {
  public:
    static constexpr std::size_t kLengths = 12;
    // What remains of what was noted: a request remembers about fifty tokens of a class.
    static constexpr double kKeepOwn = 0.98, kKeepAll = 0.998;
    static std::size_t length_class(std::int32_t length) noexcept;

    void note(std::int32_t length, bool right, double keep) noexcept;
    // Mixed with `prior`, which counts as much as `weight` tokens.
    double chance(std::int32_t length, double prior, double weight) const noexcept;

  private:
    std::array<double, kLengths> tries_{};
    std::array<double, kLengths> hits_{};
};

class Drafter final : public DraftSource {
  public:
    // Tokens that automata take up in one plan.
    static constexpr std::size_t kTokensPerPlan = 1024;
    static constexpr std::size_t kLongest = 48;              // tokens of a draft
    static constexpr std::size_t kSharedTokensMax = 65'536;  // of a generation

    // Automata take no more than so much, as `SuffixAutomaton::size_bytes` counts.
    // `window`: see `Proposer`.
    explicit Drafter(std::size_t memory_max_bytes, TokenCount window = TokenCount(0))
        : memory_max_bytes_(memory_max_bytes), proposer_(window) {}

    void follow(std::span<const Request* const> running) override;
    void draft(std::span<Row> rows, const Step& step, const StepTimeModel& model) override;
    void propose(std::span<Ask> rows, const Step& step, const StepTimeModel& model) override;
    bool wants_rest(const Request& request) override;
    void ended(RequestId request) noexcept override;
    std::size_t size_bytes() const noexcept override { return size_bytes_; }

  private:
    struct Memory {
        TenantId tenant;
        std::uint64_t salt;
        SuffixAutomaton automaton;
        std::size_t size_bytes = 0;  // as counted last
        std::size_t untold = 0;      // of its last tokens, those that were written and not shared
    };
    // What the requests of a tenant and salt wrote.
    struct Shared {
        SuffixAutomaton young, old;
        std::int64_t generation = 0;  // of all that there ever were
        std::int64_t used = 0;        // in which plan
        std::size_t size_bytes = 0;
    };
    using Owner = std::pair<std::uint64_t, std::uint64_t>;  // tenant and salt
    // Where a request stands in what its tenant shares.
    struct Beside {
        std::optional<std::int64_t> generation;
        std::size_t fed = 0;  // of the request's tokens
        SuffixAutomaton::Matcher young, old;
        MatchRecord record;
    };
    // What says what comes next.
    struct Witness {
        const SuffixAutomaton* automaton;
        Occurrence match;
        const MatchRecord* own;
        const MatchRecord* others;
        std::size_t most;  // tokens it can tell
    };
    // A request that runs.
    struct Reader {
        std::list<Memory> memory;  // one, none once it failed to grow
        std::size_t read = 0;      // of the request's tokens
        MatchRecord record;
        Beside beside;
        bool rested = false;           // it was left out of a plan for a draft
        TokenCount rests_again_at{0};  // not before it knows so many tokens
    };

    Reader& reader_of(const Request& request);
    bool inherit(Reader& reader, const Request& request);
    std::size_t read(Reader& reader, const Request& request, std::size_t most);
    void count(Memory& memory) noexcept;
    void forget(Reader& reader) noexcept;
    bool make_room(std::size_t more) noexcept;
    bool make_room_for(const Memory& memory, std::size_t tokens) noexcept;
    void drop_oldest() noexcept;
    void follow_shared(Reader& reader, const Request& request) noexcept;
    void share(std::size_t most);
    std::size_t tell(Memory& memory, std::size_t tokens);
    Witness witness(const Reader& reader, const Request& request) const noexcept;
    Witness beside(const Reader& reader, const Shared& shared) const noexcept;
    static double chance(const Witness& witness, std::int32_t length) noexcept;
    std::vector<float> chances(const Request& request, std::size_t most) const;
    const Reader* ready(const Request& request) const noexcept;

    std::size_t memory_max_bytes_;
    std::size_t size_bytes_ = 0;  // of all automata
    std::unordered_map<std::int64_t, Reader> readers_;
    const SuffixAutomaton nothing_;
    std::list<Memory> kept_;  // of requests that ended, used last first
    std::map<Owner, Shared> shared_;
    std::int64_t plans_ = 0, generations_ = 0;
    MatchRecord record_, beside_record_;  // of all
    Proposer proposer_;
    std::int64_t dear_for_ = 0;  // steps in a row in which a likely draft was not worth its time
    std::int64_t patience_ = 256;
};

}  // namespace tokenspeed::control
