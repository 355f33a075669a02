// The scheduler: decides what each step runs and who holds which page. One thread at a time.
//
//     plan()    applies the events that arrived, then drafts rows (decode, prefill, admissions)
//               and launches them as one step
//     commit()  retires the oldest step, hands its tokens to their requests, ends those that stop
//
// The same calls give the same plans: every choice goes by priority, then arrival.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <span>
#include <unordered_map>
#include <variant>
#include <vector>

#include "errors.h"
#include "plan.h"
#include "policy.h"
#include "requests.h"
#include "steps.h"

namespace tokenspeed::control {

struct Config {
    std::int32_t pages;
    std::int32_t page_size;
    std::int32_t slots_max;
    std::int32_t step_tokens_max;
    std::int32_t context_max;
    std::int32_t overlap_depth;
    bool prefix_cache;
};

class Scheduler {
  public:
    explicit Scheduler(const Config& config);  // throws ConfigError
    Scheduler(const Scheduler&) = delete;
    Scheduler& operator=(const Scheduler&) = delete;
    ~Scheduler();

    // Queued until the next plan. Throws InvalidParameter or ContextOverflow.
    void submit(Submission&& wish);
    // Queued until the next plan; an unknown id may just have finished, and is ignored.
    void abort(RequestId request);

    // Nothing when nothing can run now, or as many steps are in flight as may be.
    [[nodiscard]] std::optional<Plan> plan();
    // Throws EngineError unless `step` is the oldest in flight and `tokens` are its samples.
    void commit(StepId step, std::span<const std::int32_t> tokens);
    [[nodiscard]] Outcome take_outcome();

    // Prompt and output so far. Throws InvalidParameter if the request is not live.
    std::vector<std::int32_t> tokens(RequestId request) const;
    Stats stats() const;

    // Frees every cached page that nothing refers to; true if that is all of them.
    bool flush_cache();
    void record_cache_events(bool on) { store_.index.record(on); }
    CacheEvents take_cache_events() { return store_.index.take_events(); }

    // Checks every invariant of ownership. Throws EngineError naming the first that is broken.
    void audit() const;

  private:
    // One request's part of a step.
    struct Row {
        SlotId slot;
        TokenCount start;
        TokenCount count;
        bool samples;
    };
    struct Flight {
        StepId step;
        std::vector<Row> rows;
        std::size_t samples;
    };
    // Where an id leads: to its place in the queue, or to the slot whose state holds it.
    struct Place {
        Order order;
        std::optional<SlotId> slot;
    };
    // One container for each state that holds a slot: by slot, at most one of them filled.
    template <class State>
    class Shelf {
      public:
        explicit Shelf(std::int32_t slots) : places_(static_cast<std::size_t>(slots)) {}
        State* at(SlotId slot) noexcept {
            auto& place = places_[static_cast<std::size_t>(slot.value)];
            return place ? &*place : nullptr;
        }
        const State* at(SlotId slot) const noexcept {
            const auto& place = places_[static_cast<std::size_t>(slot.value)];
            return place ? &*place : nullptr;
        }
        State& put(State&& state) noexcept {
            auto& place = places_[static_cast<std::size_t>(state.slot.id().value)];
            return place.emplace(std::move(state));
        }
        State take(SlotId slot) noexcept {
            auto& place = places_[static_cast<std::size_t>(slot.value)];
            State state = std::move(*place);
            place.reset();
            return state;
        }
        template <class Visit>
        void each(Visit&& visit) const {
            for (const auto& place : places_) {
                if (place) visit(*place);
            }
        }

      private:
        std::vector<std::optional<State>> places_;
    };
    using Live = std::variant<Queued, Prefilling, Decoding, Stepping, Doomed>;

    // --- events ---
    void apply_events();
    void apply(Queued&& submitted);
    void apply(RequestId aborted);
    Live extract(const Place& place);

    // --- endings: each reports the one terminal event of its request ---
    void reserve_endings(std::size_t more);
    void conclude(const Finished& finished) noexcept;
    void conclude(Doomed&& doomed) noexcept;
    void leave_order(SlotId slot) noexcept;

    // --- drafting a step ---
    enum class Room { kReady, kWait, kGone };
    void draft_decodes();
    void draft_prefills();
    bool admit_head(std::optional<Order> before);
    void draft(SlotId slot, TokenCount start, TokenCount count, bool samples);
    const Request& running(SlotId slot) const noexcept;
    bool decodes_next(const Stepping& request) const noexcept;
    Room find_page(std::size_t rank);
    void retract_from(SlotId slot);
    void seat(Queued&& queued, Admission&& ticket) noexcept;

    // --- launching it ---
    Plan launch_drafts();
    void launch_row(const Row& row, std::int32_t index, Berth&& berth, Plan& plan) noexcept;

    // --- its return ---
    void reserve_commit(const Flight& flight);
    void land_row(const Row& row, const Retired& done, std::optional<std::int32_t> token,
                  std::int32_t sample);
    void land_doomed(SlotId slot, const Retired& done) noexcept;

    TokenCount page_size_;
    TokenCount context_max_;
    std::int32_t step_tokens_max_;
    std::int32_t slots_max_;
    Store store_;
    StepLedger ledger_;

    std::deque<std::variant<Queued, RequestId>> arrivals_;  // submissions and aborts, as they came
    std::unordered_map<std::int64_t, Place> places_;        // looked up by id, never iterated
    std::map<Order, std::optional<Queued>> queued_;  // an empty entry is room for one about to come
    Shelf<Prefilling> prefilling_;
    Shelf<Decoding> decoding_;
    Shelf<Stepping> stepping_;
    Shelf<Doomed> doomed_;
    std::size_t doomed_count_ = 0;
    std::vector<SlotId> order_;  // slots of Prefilling, Decoding and Stepping by Order
    std::deque<Flight> flights_;

    // The plan in the making.
    std::vector<Row> rows_;
    std::int32_t budget_ = 0;
    std::int32_t decode_count_ = 0;
    bool starved_ = false;           // a decode row had to do without its page
    std::optional<SlotId> resting_;  // left out of this plan, so that it can be retracted

    // Said in the next plan.
    TableDeltas table_;
    std::vector<std::int32_t> bound_slots_;
    std::vector<std::int64_t> bound_requests_;
    std::vector<Swap> swaps_;

    // The head of the queue that did not fit, and the room it wants: no probe before that.
    struct Blocked {
        Order order;
        PageCount wanted;
    };
    std::optional<Blocked> blocked_;

    Outcome outcome_;
    std::int64_t arrivals_seen_ = 0;
    std::int64_t steps_ = 0, prompt_tokens_ = 0, cached_tokens_ = 0, output_tokens_ = 0;
    std::int64_t retractions_ = 0;
};

}  // namespace tokenspeed::control
