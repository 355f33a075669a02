// Steps fly in order and retire in order; `Retired` is the proof that one did.
#pragma once

#include <cassert>
#include <cstddef>

#include "ids.h"

namespace tokenspeed::control {

// Proof that a step, and so every step before it, has retired. Only the ledger mints it, once per
// step; what was lent to a step is reclaimed by showing it.
class [[nodiscard]] Retired {
  public:
    Retired(Retired&&) noexcept = default;
    Retired& operator=(Retired&&) = delete;

    StepId step() const noexcept { return step_; }
    bool covers(StepId step) const noexcept { return step <= step_; }

  private:
    friend class StepLedger;
    explicit Retired(StepId step) noexcept : step_(step) {}
    StepId step_;
};

// Numbers the steps and knows which are in flight. No function retires a step of the caller's
// choice: retiring out of order cannot be written.
class StepLedger {
  public:
    explicit StepLedger(std::size_t overlap_depth) noexcept : flying_max_(overlap_depth + 1) {}

    std::size_t in_flight() const noexcept {
        return static_cast<std::size_t>(next_.value - oldest_.value);
    }
    std::size_t depth() const noexcept { return flying_max_ - 1; }
    bool full() const noexcept { return in_flight() == flying_max_; }
    StepId oldest() const noexcept { return oldest_; }

    [[nodiscard]] StepId launch() noexcept {
        assert(!full());
        return StepId(next_.value++);
    }

    Retired retire() noexcept {
        assert(in_flight() > 0);
        return Retired(StepId(oldest_.value++));
    }

  private:
    std::size_t flying_max_;
    StepId oldest_{0};
    StepId next_{0};
};

}  // namespace tokenspeed::control
