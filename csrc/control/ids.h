// Strong ids and counts: a page is not a slot, an index is not a count.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>

namespace tokenspeed::control {

// A name for one thing of a kind. Ids are compared, never added.
template <class Tag, class Rep>
struct Id {
    Rep value;
    constexpr explicit Id(Rep v) noexcept : value(v) {}
    friend constexpr auto operator<=>(Id, Id) noexcept = default;
};

// A cache group keeps one kind of KV: every position, a window of the last ones, compressed
// latents, or the state of a recurrence. A tier is a place where KV can live. A page belongs to one
// of each, and so does its number.
struct Full;
struct Window;
struct Latent;
struct Recurrent;
struct Device;
struct Host;

template <class Group, class Tier>
struct PageTag;
template <class Group, class Tier = Device>
using PageId = Id<PageTag<Group, Tier>, std::int32_t>;
using NodeId = Id<struct NodeTag, std::int32_t>;  // a page's worth of content in the prefix index
using SlotId = Id<struct SlotTag, std::int32_t>;
using StepId = Id<struct StepTag, std::int64_t>;
using TransferId = Id<struct TransferTag, std::int64_t>;
using RequestId = Id<struct RequestTag, std::int64_t>;

// How many of a kind. Counts of one kind add up; counts of two kinds do not meet.
template <class Tag>
struct Count {
    std::int32_t value = 0;
    constexpr Count() noexcept = default;
    constexpr explicit Count(std::int32_t v) noexcept : value(v) {}
    friend constexpr auto operator<=>(Count, Count) noexcept = default;
    friend constexpr Count operator+(Count a, Count b) noexcept { return Count(a.value + b.value); }
    friend constexpr Count operator-(Count a, Count b) noexcept { return Count(a.value - b.value); }
    constexpr Count& operator+=(Count other) noexcept { return *this = *this + other; }
    constexpr Count& operator-=(Count other) noexcept { return *this = *this - other; }
};

using PageCount = Count<struct PagesTag>;
using TokenCount = Count<struct TokensTag>;

inline std::size_t size_of(TokenCount tokens) {
    return static_cast<std::size_t>(tokens.value);
}

// Pages that hold `tokens` positions, the last one perhaps in part.
constexpr PageCount pages_for(TokenCount tokens, TokenCount page_size) noexcept {
    return PageCount((tokens.value + page_size.value - 1) / page_size.value);
}

}  // namespace tokenspeed::control
