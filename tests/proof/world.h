// A scheduler, its device and its clients; every event is checked from all three sides.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "adversary.h"
#include "device.h"
#include "scheduler.h"

namespace tokenspeed::proof {

// What a client asks for, and what it gets when nothing else runs.
struct Script {
    std::vector<std::int32_t> prompt;
    std::int64_t max_new_tokens = 1;
    std::int64_t min_new_tokens = 0;
    std::vector<std::int32_t> stop_token_ids = {};
    std::uint64_t salt = 0;
    std::int32_t priority = 0;
    control::Handover handover = control::Handover::kNone;

    // Filled in by `rehearse`.
    std::vector<std::int32_t> history = {};  // prompt and output
    std::vector<std::uint64_t> states = {};  // of a recurrence, after so many of them
    control::FinishReason reason = control::FinishReason::kLength;
};

void rehearse(Script& script, std::int32_t vocabulary, std::int32_t context_max);

// Makes allocations fail.
class Faults {
  public:
    virtual void arm() = 0;     // one of the next allocations fails, or none
    virtual void disarm() = 0;  // no further one does
    virtual bool waits() = 0;   // whether a call that failed is made again later, not at once

  protected:
    ~Faults() = default;
};

class World final : private Histories {
  public:
    struct Checks {
        bool scribble;             // overwrite what is free after every event
        std::int64_t audit_every;  // events
        std::int64_t step_us = 0;  // by how much time goes on at each plan
        bool own_drafts = false;   // the control plane guesses itself, and nobody else
        Faults* faults = nullptr;  // a call that fails must leave everything whole, and go again
    };

    World(const control::Config& config, Checks checks);
    World(const control::Config& config, Checks checks, std::unique_ptr<Adversary> adversary);
    World(const World&) = delete;
    World& operator=(const World&) = delete;

    // `script` is rehearsed and stays where it is.
    void submit(std::int64_t request, const Script& script);
    // Whether it was of a request that the scheduler still knows.
    bool abort(std::int64_t request);
    // Whether there was a step to launch. Its drafts are as chosen; who flies is left out of it, so
    // as to be at rest for one, if `rests`. Its rows are to have proposals of `asks` tokens.
    bool launch(Adversary::Choose guesses = nullptr, bool rests = false, std::size_t asks = 0,
                const Device::Foresee& foresee = nullptr);
    void commit();
    void flush();
    // A request's transfer is over: it did what it should, or failed.
    void transferred(std::int64_t request, bool complete);

    bool in_flight() const { return device_.in_flight() > 0; }
    bool travels(std::int64_t request) const { return device_.transfers().contains(request); }
    bool any_travels() const { return !device_.transfers().empty(); }
    bool full() const {
        return device_.in_flight() > static_cast<std::size_t>(config_.overlap_depth);
    }
    bool accepted(std::int64_t request) const { return clients_.contains(request); }
    bool live(std::int64_t request) const;
    bool aborted(std::int64_t request) const;
    std::size_t live_count() const { return live_; }
    // Tokens a request got.
    std::size_t outputs(std::int64_t request) const;
    // Nobody will ask about a finished request any more. Not while it may be in flight.
    void forget(std::int64_t request) { clients_.erase(request); }

    // Runs as the engine does until nothing can run; everybody must have ended by then.
    void drain(std::int64_t turns_max);
    void check_rest();

    const control::Scheduler& scheduler() const { return scheduler_; }
    // A trail that went well before need not be checked at each of its events.
    void check_events(bool on);
    // Equal for states with equal futures. A hash of 128 bits. `aborts_scarce`: whether the number
    // of aborts so far decides whether there may be another.
    using Key = std::array<std::uint64_t, 2>;
    Key key(bool aborts_scarce) const;

  private:
    struct Client {
        const Script* script;
        std::int64_t arrival;
        std::size_t outputs = 0;
        std::int32_t cached = -1;
        std::int32_t stays = 0;
        std::size_t outputs_at_stay = 0;
        bool aborted = false;
        bool ended = false;
        bool sent = false;
        bool failed = false;  // a transfer of it
    };

    template <class Call>
    bool attempt(Call&& call, bool may_wait = false);
    History of(std::int64_t request) const override;
    Client& client(std::int64_t request);
    const Client& client(std::int64_t request) const;
    void collect(const std::vector<std::int32_t>* tokens);
    void check_end(const Client& client, control::FinishReason reason) const;
    void check_turn(std::int64_t request) const;
    void after_event();

    control::Config config_;
    Checks checks_;
    Adversary* adversary_;  // the scheduler's
    control::Scheduler scheduler_;
    Device device_;
    std::optional<std::size_t> capacity_;  // tokens that the pool can hold of one request
    struct Flight {
        control::StepId step;
        std::vector<std::int32_t> tokens;
        Proposals proposals;
    };
    std::deque<Flight> flights_;
    std::map<std::int64_t, Client> clients_;
    std::int64_t submitted_ = 0;
    bool checks_events_ = true;
    std::size_t live_ = 0;
    std::int64_t events_ = 0;
    std::int64_t now_us_ = 0;
};

}  // namespace tokenspeed::proof
