// Running slots: the seats of the execution plane, taken by a running request.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "ids.h"
#include "linear.h"

namespace tokenspeed::control {

// The right to one running slot.
class [[nodiscard]] Slot : public Linear<SlotId> {
  public:
    Slot(Slot&&) noexcept = default;
    Slot& operator=(Slot&&) noexcept = default;

  private:
    friend class SlotPool;
    explicit Slot(SlotId id) noexcept : Linear(id) {}
};

class SlotPool {
  public:
    explicit SlotPool(std::int32_t slots) {
        free_.reserve(static_cast<std::size_t>(slots));
        for (std::int32_t id = slots - 1; id >= 0; --id) free_.push_back(Slot(SlotId(id)));
    }
    SlotPool(const SlotPool&) = delete;
    SlotPool& operator=(const SlotPool&) = delete;
    ~SlotPool() {
        for (Slot& slot : free_) static_cast<void>(slot.melt());
    }

    bool empty() const noexcept { return free_.empty(); }
    [[nodiscard]] std::optional<Slot> take() noexcept {
        if (free_.empty()) return std::nullopt;
        std::optional<Slot> slot(std::move(free_.back()));
        free_.pop_back();
        return slot;
    }
    void give(Slot&& slot) noexcept { free_.push_back(std::move(slot)); }

    // For audits: shows every free slot.
    template <class Visit>
    void each_free(Visit&& visit) const {
        for (const Slot& slot : free_) visit(slot.id());
    }

  private:
    std::vector<Slot> free_;
};

}  // namespace tokenspeed::control
