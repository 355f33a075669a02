// Running slots: the seats of the execution plane, taken by a running request.
#pragma once

#include <cassert>
#include <optional>
#include <utility>
#include <vector>

#include "ids.h"

namespace tokenspeed::control {

// The right to one running slot; linear as a page is.
class [[nodiscard]] Slot {
  public:
    Slot(Slot&& other) noexcept : id_(other.id_), held_(std::exchange(other.held_, false)) {}
    Slot& operator=(Slot&& other) noexcept {
        assert(!held_ && "a slot was overwritten instead of returned");
        id_ = other.id_;
        held_ = std::exchange(other.held_, false);
        return *this;
    }
    ~Slot() { assert(!held_ && "a slot was dropped instead of returned"); }

    SlotId id() const noexcept { return id_; }

  private:
    friend class SlotPool;
    explicit Slot(SlotId id) noexcept : id_(id) {}
    SlotId id_;
    bool held_ = true;
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
        for (Slot& slot : free_) slot.held_ = false;
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
