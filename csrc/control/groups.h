// Cache groups: what a model keeps of the past, each kind with pages and a page table of its own.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "ids.h"

namespace tokenspeed::control {

// The numbers are core.config.CacheGroupKind's.
enum class GroupKind : std::int32_t { kFull = 0, kWindow = 1, kLatent = 2, kRecurrent = 3 };
inline constexpr std::size_t kGroupKinds = 4;

// Every position is kept and may be read.
struct Full {
    static constexpr GroupKind kKind = GroupKind::kFull;
};
// Only the last positions are read: a page behind the window returns at once.
struct Window {
    static constexpr GroupKind kKind = GroupKind::kWindow;
};
// As full, of compressed KV (MLA).
struct Latent {
    static constexpr GroupKind kKind = GroupKind::kLatent;
};
// A state that each step overwrites; a page is one state, and copies of it are kept at checkpoints.
struct Recurrent {
    static constexpr GroupKind kKind = GroupKind::kRecurrent;
};

// Pages of the group hold positions, one page after the other.
template <class G>
inline constexpr bool kPaged = G::kKind != GroupKind::kRecurrent;
// Every position is needed, so a page is of use only together with all pages before it.
template <class G>
inline constexpr bool kWhole = G::kKind == GroupKind::kFull || G::kKind == GroupKind::kLatent;

// One thing of each group.
template <template <class> class T>
struct PerGroup {
    T<Full> full;
    T<Window> window;
    T<Latent> latent;
    T<Recurrent> recurrent;

    template <class G>
    auto& of() noexcept {
        return pick<G>(*this);
    }
    template <class G>
    const auto& of() const noexcept {
        return pick<G>(*this);
    }

  private:
    template <class G, class Self>
    static auto& pick(Self& self) noexcept {
        if constexpr (G::kKind == GroupKind::kFull) return self.full;
        if constexpr (G::kKind == GroupKind::kWindow) return self.window;
        if constexpr (G::kKind == GroupKind::kLatent) return self.latent;
        if constexpr (G::kKind == GroupKind::kRecurrent) return self.recurrent;
    }
};

// Calls `visit.operator()<G>()` for each group.
template <class Visit>
constexpr void each_group(Visit&& visit) {
    visit.template operator()<Full>();
    visit.template operator()<Window>();
    visit.template operator()<Latent>();
    visit.template operator()<Recurrent>();
}

// One number for each group.
struct PageCounts {
    std::array<PageCount, kGroupKinds> by_kind{};
    template <class G>
    PageCount& of() noexcept {
        return by_kind[static_cast<std::size_t>(G::kKind)];
    }
    template <class G>
    PageCount of() const noexcept {
        return by_kind[static_cast<std::size_t>(G::kKind)];
    }
};

// One cache group of a model, as configured.
struct GroupConfig {
    GroupKind kind;
    std::int32_t pages;
    std::int32_t host_pages;        // 0: no host tier
    std::int32_t window;            // tokens a query sees, itself included; window groups only
    std::int32_t checkpoint_pages;  // pages between two kept states; recurrent groups only
};

}  // namespace tokenspeed::control
