// Linear pages: FreePage -> OpenPage -> SealedPage, PageRef to share, InFlight<T> to lend.
//
// The number of a page is worth nothing; the object is the right to it. An object is moved on or
// given back, never copied, conjured or dropped:
//
//     FreePage    open      -> OpenPage       nobody's content
//     OpenPage    lend      -> InFlight       exclusive, writable by a step it is lent to
//     InFlight    reclaim   -> OpenPage       only with the proof that the step retired
//     OpenPage    seal      -> SealedPage     only with the proof that its writer retired
//     SealedPage  (PrefixIndex) -> PageRef    immutable, shared by counted references
#pragma once

#include <cassert>
#include <cstddef>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "ids.h"
#include "steps.h"

namespace tokenspeed::control {

class PageMint;

template <class Kind>
class [[nodiscard]] Page {
  public:
    Page() = delete;
    Page(const Page&) = delete;
    Page& operator=(const Page&) = delete;
    Page(Page&& other) noexcept : id_(other.id_), held_(std::exchange(other.held_, false)) {}
    Page& operator=(Page&& other) noexcept {
        assert(!held_ && "a page was overwritten instead of returned");
        id_ = other.id_;
        held_ = std::exchange(other.held_, false);
        return *this;
    }
    ~Page() { assert(!held_ && "a page was dropped instead of returned"); }

    PageId id() const noexcept {
        assert(held_ && "a page was used after it was handed on");
        return id_;
    }

  private:
    friend PageMint;
    explicit Page(PageId id) noexcept : id_(id) {}
    PageId id_;
    bool held_ = true;
};

using FreePage = Page<struct FreeKind>;      // holds nothing of anybody's
using OpenPage = Page<struct OpenKind>;      // exclusive and writable
using SealedPage = Page<struct SealedKind>;  // immutable; the one owner of a sealed page
using PageRef = Page<struct RefKind>;        // one counted share of a sealed page

// The one place where a page changes its kind; private to those who may.
class PageMint {
    friend class PagePool;
    friend class PrefixIndex;
    friend OpenPage open(FreePage&& page) noexcept;
    friend SealedPage seal(OpenPage&& page, const Retired& done) noexcept;

    template <class To>
    static To mint(PageId id) noexcept {
        return To(id);
    }
    template <class From>
    static PageId melt(From&& page) noexcept {
        static_assert(!std::is_lvalue_reference_v<From>, "a page is handed on by move");
        PageId id = page.id();
        page.held_ = false;
        return id;
    }
};

inline OpenPage open(FreePage&& page) noexcept {
    return PageMint::mint<OpenPage>(PageMint::melt(std::move(page)));
}

// Only what a retired step wrote can be shared, so sealing wants the proof.
inline SealedPage seal(OpenPage&& page, const Retired&) noexcept {
    return PageMint::mint<SealedPage>(PageMint::melt(std::move(page)));
}

// A page lent to a launched step. Nothing takes it apart but the proof that the step retired.
template <class T>
class [[nodiscard]] InFlight {
  public:
    InFlight(InFlight&&) noexcept = default;
    InFlight& operator=(InFlight&&) noexcept = default;

    PageId id() const noexcept { return page_.id(); }
    StepId until() const noexcept { return until_; }

  private:
    InFlight(T&& page, StepId until) noexcept : page_(std::move(page)), until_(until) {}
    friend InFlight<OpenPage> lend(OpenPage&& page, StepId step) noexcept;
    friend InFlight<SealedPage> lend(SealedPage&& page, StepId step) noexcept;
    friend InFlight<OpenPage> extend(InFlight<OpenPage>&& lease, StepId later) noexcept;
    template <class U>
    friend U reclaim(InFlight<U>&& lease, const Retired& done) noexcept;

    T page_;
    StepId until_;
};

inline InFlight<OpenPage> lend(OpenPage&& page, StepId step) noexcept {
    return {std::move(page), step};
}
inline InFlight<SealedPage> lend(SealedPage&& page, StepId step) noexcept {
    return {std::move(page), step};
}
// Overlap: the lease moves on to a later step, which writes the same page.
inline InFlight<OpenPage> extend(InFlight<OpenPage>&& lease, StepId later) noexcept {
    assert(later > lease.until_);
    return {std::move(lease.page_), later};
}
template <class T>
T reclaim(InFlight<T>&& lease, [[maybe_unused]] const Retired& done) noexcept {
    assert(done.covers(lease.until_) && "a page was reclaimed before its step retired");
    return std::move(lease.page_);
}

// Where a step may write: asked of a page that is lent to it, so a sealed page has none.
inline std::int32_t kv_slot(const InFlight<OpenPage>& lease, TokenCount offset,
                            TokenCount page_size) noexcept {
    return lease.id().value * page_size.value + offset.value;
}

// Mints every page once, at the start, and holds those that are free.
class PagePool {
  public:
    explicit PagePool(PageCount pages) : pages_(pages) {
        free_.reserve(static_cast<std::size_t>(pages.value));
        for (std::int32_t id = pages.value - 1; id >= 0; --id) {
            free_.push_back(PageMint::mint<FreePage>(PageId(id)));
        }
    }
    PagePool(const PagePool&) = delete;
    PagePool& operator=(const PagePool&) = delete;
    ~PagePool() {
        for (FreePage& page : free_) static_cast<void>(PageMint::melt(std::move(page)));
    }

    PageCount total() const noexcept { return pages_; }
    PageCount free_count() const noexcept {
        return PageCount(static_cast<std::int32_t>(free_.size()));
    }

    [[nodiscard]] std::optional<FreePage> take() noexcept {
        if (free_.empty()) return std::nullopt;
        std::optional<FreePage> page(std::move(free_.back()));
        free_.pop_back();
        return page;
    }
    void give(FreePage&& page) noexcept { free_.push_back(std::move(page)); }
    void give(OpenPage&& page) noexcept { give_back(std::move(page)); }
    void give(SealedPage&& page) noexcept { give_back(std::move(page)); }

    // For audits: shows every free page.
    template <class Visit>
    void each_free(Visit&& visit) const {
        for (const FreePage& page : free_) visit(page.id());
    }

  private:
    // Never allocates: the vector was reserved for every page there is.
    template <class Kind>
    void give_back(Kind&& page) noexcept {
        free_.push_back(PageMint::mint<FreePage>(PageMint::melt(std::move(page))));
    }

    PageCount pages_;
    std::vector<FreePage> free_;
};

}  // namespace tokenspeed::control
