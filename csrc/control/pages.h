// Linear pages: FreePage -> OpenPage -> SealedPage, PageRef to share, InFlight and InTransit to
// lend, DraftPage for guesses.
//
// The number of a page is worth nothing; the object is the right to it. An object is moved on or
// given back, never copied, conjured or dropped. Each belongs to a cache group and a tier, and
// meets only its own:
//
//     FreePage    open      -> OpenPage       nobody's content
//     OpenPage    lend      -> InFlight       exclusive, writable by a step it is lent to
//     InFlight    reclaim   -> OpenPage       only with the proof that the step retired
//     OpenPage    depart    -> InTransit      exclusive, touched by a transfer
//     InTransit   reclaim   -> OpenPage       only with the proof that the transfer is over
//     OpenPage    seal      -> SealedPage     only with the proof that its writer is done
//     SealedPage  (TierCache) -> PageRef      immutable, shared by counted references
//
// What a step writes on a guess is nobody's content until the guess was verified:
//
//     OpenPage    guess     -> DraftPage      a step may write past what is known
//     DraftPage   settle    -> FilledPage     every position verified: it seals
//                           -> OpenPage       verified in part: the rest is written again
//                           -> FreePage       rolled back: nothing reads it, nothing seals it
//
// and only the proof of the verification settles it.
#pragma once

#include <cassert>
#include <cstddef>
#include <optional>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "groups.h"
#include "ids.h"
#include "linear.h"
#include "steps.h"
#include "transfers.h"
#include "verified.h"

namespace tokenspeed::control {

class PageMint;

template <class Kind, class Group, class Tier>
class [[nodiscard]] Page : public Linear<PageId<Group, Tier>> {
  public:
    Page(Page&&) noexcept = default;
    Page& operator=(Page&&) noexcept = default;

  private:
    friend PageMint;
    explicit Page(PageId<Group, Tier> id) noexcept : Linear<PageId<Group, Tier>>(id) {}
};

struct FreeKind;
struct OpenKind;
struct SealedKind;
struct RefKind;
struct DraftKind;
struct FilledKind;

template <class G, class T = Device>
using FreePage = Page<FreeKind, G, T>;  // holds nothing of anybody's
template <class G, class T = Device>
using OpenPage = Page<OpenKind, G, T>;  // exclusive and writable
template <class G, class T = Device>
using SealedPage = Page<SealedKind, G, T>;  // immutable; the one owner of a sealed page
template <class G, class T = Device>
using PageRef = Page<RefKind, G, T>;  // one counted share of a sealed page

template <class G, class T = Device>
using DraftPage = Page<DraftKind, G, T>;  // exclusive, written past what is known
template <class G, class T = Device>
using FilledPage = Page<FilledKind, G, T>;  // a draft's page, verified to its last position

template <class G, class T = Device>
using SettledPage = std::variant<FilledPage<G, T>, OpenPage<G, T>, FreePage<G, T>>;

template <class G, class T>
OpenPage<G, T> open(Page<FreeKind, G, T>&& page) noexcept;
template <class G, class T>
SealedPage<G, T> seal(Page<OpenKind, G, T>&& page, const Retired& done) noexcept;
template <class G, class T>
SealedPage<G, T> seal(Page<OpenKind, G, T>&& page, const Arrived& done) noexcept;
template <class G, class T>
SealedPage<G, T> seal(Page<FilledKind, G, T>&& page) noexcept;
template <class G, class T>
DraftPage<G, T> guess(Page<OpenKind, G, T>&& page) noexcept;
template <class G, class T>
SettledPage<G, T> settle(Page<DraftKind, G, T>&& page, std::size_t index, TokenCount page_size,
                         const Verified& verified) noexcept;

// The one place where a page changes its kind; private to those who may.
class PageMint {
    template <class G, class T>
    friend class PagePool;
    template <class G, class T>
    friend class TierCache;
    template <class G, class T>
    friend OpenPage<G, T> open(Page<FreeKind, G, T>&& page) noexcept;
    template <class G, class T>
    friend SealedPage<G, T> seal(Page<OpenKind, G, T>&& page, const Retired& done) noexcept;
    template <class G, class T>
    friend SealedPage<G, T> seal(Page<OpenKind, G, T>&& page, const Arrived& done) noexcept;
    template <class G, class T>
    friend SealedPage<G, T> seal(Page<FilledKind, G, T>&& page) noexcept;
    template <class G, class T>
    friend DraftPage<G, T> guess(Page<OpenKind, G, T>&& page) noexcept;
    template <class G, class T>
    friend SettledPage<G, T> settle(Page<DraftKind, G, T>&& page, std::size_t index,
                                    TokenCount page_size, const Verified& verified) noexcept;

    template <class To, class Id>
    static To mint(Id id) noexcept {
        return To(id);
    }
    template <class From>
    static auto melt(From&& page) noexcept {
        static_assert(!std::is_lvalue_reference_v<From>, "a page is handed on by move");
        return page.melt();
    }
};

template <class G, class T>
OpenPage<G, T> open(Page<FreeKind, G, T>&& page) noexcept {
    return PageMint::mint<OpenPage<G, T>>(PageMint::melt(std::move(page)));
}

// Only what a retired step wrote, or a transfer that is over, can be shared: sealing wants proof.
template <class G, class T>
SealedPage<G, T> seal(Page<OpenKind, G, T>&& page, const Retired&) noexcept {
    return PageMint::mint<SealedPage<G, T>>(PageMint::melt(std::move(page)));
}
template <class G, class T>
SealedPage<G, T> seal(Page<OpenKind, G, T>&& page, const Arrived&) noexcept {
    return PageMint::mint<SealedPage<G, T>>(PageMint::melt(std::move(page)));
}

// A step is about to write in it what may turn out to be wrong.
template <class G, class T>
DraftPage<G, T> guess(Page<OpenKind, G, T>&& page) noexcept {
    return PageMint::mint<DraftPage<G, T>>(PageMint::melt(std::move(page)));
}
// The page at `index` of its request, by how much of it was verified.
template <class G, class T>
SettledPage<G, T> settle(Page<DraftKind, G, T>&& page, std::size_t index, TokenCount page_size,
                         const Verified& verified) noexcept {
    const auto size = static_cast<std::size_t>(page_size.value);
    const auto written = static_cast<std::size_t>(verified.written().value);
    const auto id = PageMint::melt(std::move(page));
    if ((index + 1) * size <= written) return PageMint::mint<FilledPage<G, T>>(id);
    if (index * size < written) return PageMint::mint<OpenPage<G, T>>(id);
    return PageMint::mint<FreePage<G, T>>(id);
}
template <class G, class T>
SealedPage<G, T> seal(Page<FilledKind, G, T>&& page) noexcept {
    return PageMint::mint<SealedPage<G, T>>(PageMint::melt(std::move(page)));
}

template <class P>
class InFlight;
template <class P>
class InTransit;

template <class Kind, class G, class T>
InFlight<Page<Kind, G, T>> lend(Page<Kind, G, T>&& page, StepId step) noexcept;
template <class G, class T>
InFlight<OpenPage<G, T>> extend(InFlight<Page<OpenKind, G, T>>&& lease, StepId later) noexcept;
template <class P>
P reclaim(InFlight<P>&& lease, const Retired& done) noexcept;
template <class Kind, class G, class T>
InTransit<Page<Kind, G, T>> depart(Page<Kind, G, T>&& page, TransferId transfer) noexcept;
template <class P>
P reclaim(InTransit<P>&& lease, const Arrived& done) noexcept;

// A page lent to a launched step. Nothing takes it apart but the proof that the step retired.
template <class P>
class [[nodiscard]] InFlight {
  public:
    InFlight(InFlight&&) noexcept = default;
    InFlight& operator=(InFlight&&) noexcept = default;

    auto id() const noexcept { return page_.id(); }
    StepId until() const noexcept { return until_; }

  private:
    InFlight(P&& page, StepId until) noexcept : page_(std::move(page)), until_(until) {}
    template <class Kind, class G, class T>
    friend InFlight<Page<Kind, G, T>> lend(Page<Kind, G, T>&& page, StepId step) noexcept;
    template <class G, class T>
    friend InFlight<OpenPage<G, T>> extend(InFlight<Page<OpenKind, G, T>>&& lease,
                                           StepId later) noexcept;
    template <class Q>
    friend Q reclaim(InFlight<Q>&& lease, const Retired& done) noexcept;

    P page_;
    StepId until_;
};

// A step writes open pages and drafts' pages, and reads sealed ones whose place another page took.
template <class Kind, class G, class T>
InFlight<Page<Kind, G, T>> lend(Page<Kind, G, T>&& page, StepId step) noexcept {
    static_assert(std::is_same_v<Kind, OpenKind> || std::is_same_v<Kind, SealedKind> ||
                      std::is_same_v<Kind, DraftKind>,
                  "only open, sealed and drafts' pages are lent");
    return {std::move(page), step};
}
// Overlap: the lease moves on to a later step, which writes the same page.
template <class G, class T>
InFlight<OpenPage<G, T>> extend(InFlight<Page<OpenKind, G, T>>&& lease, StepId later) noexcept {
    assert(later > lease.until_);
    return {std::move(lease.page_), later};
}
template <class P>
P reclaim(InFlight<P>&& lease, [[maybe_unused]] const Retired& done) noexcept {
    assert(done.covers(lease.until_) && "a page was reclaimed before its step retired");
    return std::move(lease.page_);
}

// A page that a transfer reads or writes. Only the proof that the transfer is over gives it back.
template <class P>
class [[nodiscard]] InTransit {
  public:
    InTransit(InTransit&&) noexcept = default;
    InTransit& operator=(InTransit&&) noexcept = default;

    auto id() const noexcept { return page_.id(); }

  private:
    InTransit(P&& page, TransferId transfer) noexcept
        : page_(std::move(page)), transfer_(transfer) {}
    template <class Kind, class G, class T>
    friend InTransit<Page<Kind, G, T>> depart(Page<Kind, G, T>&& page,
                                              TransferId transfer) noexcept;
    template <class Q>
    friend Q reclaim(InTransit<Q>&& lease, const Arrived& done) noexcept;

    P page_;
    TransferId transfer_;
};

// A transfer fills or reads an open page, or reads what a reference keeps in place.
template <class Kind, class G, class T>
InTransit<Page<Kind, G, T>> depart(Page<Kind, G, T>&& page, TransferId transfer) noexcept {
    static_assert(std::is_same_v<Kind, OpenKind> || std::is_same_v<Kind, RefKind>,
                  "only open pages and references travel");
    return {std::move(page), transfer};
}
template <class P>
P reclaim(InTransit<P>&& lease, [[maybe_unused]] const Arrived& done) noexcept {
    assert(done.covers(lease.transfer_) && "a page was reclaimed before its transfer was over");
    return std::move(lease.page_);
}

// Where a step may write: asked of a page that is lent to it, so a sealed page has none.
template <class G>
std::int32_t kv_slot(const InFlight<OpenPage<G>>& lease, TokenCount offset,
                     TokenCount page_size) noexcept {
    return lease.id().value * page_size.value + offset.value;
}
template <class G>
std::int32_t kv_slot(const InFlight<DraftPage<G>>& lease, TokenCount offset,
                     TokenCount page_size) noexcept {
    return lease.id().value * page_size.value + offset.value;
}

// Mints every page of a group and tier once, at the start, and holds those that are free.
template <class G, class T>
class PagePool {
  public:
    explicit PagePool(PageCount pages) : pages_(pages) {
        free_.reserve(static_cast<std::size_t>(pages.value));
        for (std::int32_t id = pages.value - 1; id >= 0; --id) {
            free_.push_back(PageMint::mint<FreePage<G, T>>(PageId<G, T>(id)));
        }
    }
    PagePool(const PagePool&) = delete;
    PagePool& operator=(const PagePool&) = delete;
    ~PagePool() {
        for (auto& page : free_) static_cast<void>(PageMint::melt(std::move(page)));
    }

    PageCount total() const noexcept { return pages_; }
    PageCount free_count() const noexcept {
        return PageCount(static_cast<std::int32_t>(free_.size()));
    }

    [[nodiscard]] std::optional<FreePage<G, T>> take() noexcept {
        if (free_.empty()) return std::nullopt;
        std::optional<FreePage<G, T>> page(std::move(free_.back()));
        free_.pop_back();
        return page;
    }
    // Never allocates: the vector was reserved for every page there is.
    void give(FreePage<G, T>&& page) noexcept { free_.push_back(std::move(page)); }
    void give(OpenPage<G, T>&& page) noexcept { give_back(std::move(page)); }
    void give(SealedPage<G, T>&& page) noexcept { give_back(std::move(page)); }
    void give(DraftPage<G, T>&& page) noexcept { give_back(std::move(page)); }

    // For audits: shows every free page.
    template <class Visit>
    void each_free(Visit&& visit) const {
        for (const auto& page : free_) visit(page.id());
    }

  private:
    template <class P>
    void give_back(P&& page) noexcept {
        free_.push_back(PageMint::mint<FreePage<G, T>>(PageMint::melt(std::move(page))));
    }

    PageCount pages_;
    std::vector<FreePage<G, T>> free_;
};

}  // namespace tokenspeed::control
