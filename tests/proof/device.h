// A device that can tell whose KV it reads: runs plans against simulated storage.
//
// What a row sees is found through page tables built from the plans' deltas, as on a real device,
// and compared with what its request should see. Nothing here knows what the scheduler knows.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <vector>

#include "fingerprint.h"
#include "plan.h"
#include "scheduler.h"
#include "storage.h"

namespace tokenspeed::proof {

class Histories {
  public:
    virtual History of(std::int64_t request) const = 0;

  protected:
    ~Histories() = default;
};

// What a draft model says to a step.
struct Proposals {
    std::vector<std::int32_t> starts = {};
    std::vector<std::int32_t> tokens = {};
    std::vector<float> chances = {};
};

class Device {
  public:
    // How many of the first tokens of a row's proposal are right; it has so many fewer than asked.
    struct Insight {
        std::size_t right = 0;
        std::size_t fewer = 0;
    };
    using Foresee = std::function<Insight()>;

    Device(const control::Config& config, const Histories& histories);

    // Runs a step; the tokens it samples. Throws Wrong where a row reads anything but its own
    // history, or writes what it may not.
    std::vector<std::int32_t> launch(const control::Plan& plan);
    // What its draft model says to the step that was launched last.
    Proposals propose(const control::Plan& plan, const Foresee& foresee);
    // The oldest step that was launched is over.
    void retire();
    std::size_t in_flight() const { return in_flight_; }

    // Transfers under way, by request.
    struct Transfer {
        std::int64_t id;
        control::TransferKind kind;
    };
    const std::map<std::int64_t, Transfer>& transfers() const { return transfers_; }
    // A request's transfer is over, and did what it should or failed.
    Transfer transferred(std::int64_t request, bool complete);

    // Overwrites every page that is not live: what nobody may read must not be needed either.
    void scribble(const control::Fingerprint& live);
    // Appends what the device holds to a fingerprint, in its names.
    void describe(control::Fingerprint& fingerprint) const;

  private:
    struct Seat {
        std::optional<std::int64_t> request;
        std::optional<std::int32_t> last;  // the token sampled last
        std::int32_t fed = 0;
        bool speculates = false;  // a row of it is in flight that has a draft, or is to have one
        std::size_t follows = 0;  // tokens it has with those of the step launched last
    };

    Seat& seat(std::int32_t slot);
    void begin(const control::Plan& plan);
    std::vector<Row> rows(const control::Plan& plan);
    std::vector<std::int32_t> verify(const Row& row);
    std::vector<std::int32_t> sample(const control::Plan& plan, std::vector<Row>& rows);

    const Histories* histories_;
    std::int32_t step_tokens_max_;
    std::int32_t step_drafts_max_;
    std::int32_t step_proposals_max_, proposal_length_max_;
    std::vector<Storage> groups_;
    std::vector<Seat> seats_;
    std::map<std::int64_t, Transfer> transfers_;
    std::size_t in_flight_ = 0;
    std::deque<std::vector<std::int32_t>> speculating_;  // slots, by step in flight
    std::optional<std::int64_t> step_;
};

}  // namespace tokenspeed::proof
