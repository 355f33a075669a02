// Transfers move pages between tiers or hosts while steps go on; `Arrived` is the proof that one
// is over, and so that nothing touches its pages any more.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "ids.h"

namespace tokenspeed::control {

// The numbers are core.step.TransferKind's.
enum class TransferKind : std::int32_t { kLoad = 0, kSend = 1, kReceive = 2 };

class [[nodiscard]] Arrived {
  public:
    Arrived(Arrived&&) noexcept = default;
    Arrived& operator=(Arrived&&) = delete;

    bool covers(TransferId transfer) const noexcept { return transfer == transfer_; }

  private:
    friend class TransferLedger;
    explicit Arrived(TransferId transfer) noexcept : transfer_(transfer) {}
    TransferId transfer_;
};

// Numbers the transfers and knows which are under way, at most one for each slot. They end in any
// order, each once. Allocates nothing after its construction.
class TransferLedger {
  public:
    explicit TransferLedger(std::int32_t slots) : open_(static_cast<std::size_t>(slots)) {}

    [[nodiscard]] TransferId begin(SlotId slot) noexcept {
        auto& open = open_[static_cast<std::size_t>(slot.value)];
        assert(!open && "a slot has one transfer at a time");
        ++under_way_;
        return open.emplace(next_++);
    }
    // Whose it is; nothing if it is not under way.
    std::optional<SlotId> owner(TransferId transfer) const noexcept {
        const auto found = std::ranges::find(open_, std::optional(transfer));
        if (found == open_.end()) return std::nullopt;
        return SlotId(static_cast<std::int32_t>(found - open_.begin()));
    }
    // Ends the transfer that a slot has under way.
    Arrived arrive(SlotId slot) noexcept {
        auto& open = open_[static_cast<std::size_t>(slot.value)];
        assert(open && "no transfer is under way");
        --under_way_;
        Arrived proof(*open);
        open.reset();
        return proof;
    }
    std::size_t under_way() const noexcept { return under_way_; }

  private:
    std::vector<std::optional<TransferId>> open_;  // by slot
    std::int64_t next_ = 0;
    std::size_t under_way_ = 0;
};

}  // namespace tokenspeed::control
