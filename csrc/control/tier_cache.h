// The sealed pages of one cache group on one tier: who refers to them, and which may go first.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "pages.h"
#include "sessions.h"

namespace tokenspeed::control {

// Owns the pool and every sealed page; a page that nothing refers to may be evicted, in the order
// that `Sessions` keeps. Nothing allocates after the construction.
template <class G, class T>
class TierCache {
  public:
    using Id = PageId<G, T>;
    TierCache(PageCount pages, Sessions& sessions)
        : sessions_(sessions),
          lane_(pages > PageCount(0) ? sessions.add_lane() : LaneId(0)),
          pool_(pages),
          records_(static_cast<std::size_t>(pages.value)) {}
    TierCache(const TierCache&) = delete;
    TierCache& operator=(const TierCache&) = delete;

    PagePool<G, T>& pool() noexcept { return pool_; }
    const PagePool<G, T>& pool() const noexcept { return pool_; }
    bool present() const noexcept { return !records_.empty(); }
    PageCount free_count() const noexcept { return pool_.free_count(); }
    PageCount cached_count() const noexcept { return cached_; }  // sealed, unreferenced
    PageCount referenced_count() const noexcept { return referenced_; }
    PageCount available() const noexcept { return free_count() + cached_; }

    // Takes a sealed page over, unreferenced: refer to it, or release what was referred to.
    PageId<G, T> keep(SealedPage<G, T>&& page, NodeId node) noexcept {
        const PageId<G, T> id = page.id();
        Record& record = at(id);
        record.page.emplace(std::move(page));
        record.node = node;
        cached_ += PageCount(1);
        return id;
    }
    NodeId node(PageId<G, T> page) const noexcept { return *at(page).node; }

    [[nodiscard]] PageRef<G, T> refer(PageId<G, T> page) noexcept {
        Record& record = at(page);
        if (record.references++ == 0) {
            cached_ -= PageCount(1);
            referenced_ += PageCount(1);
            withhold(page);
        }
        return PageMint::mint<PageRef<G, T>>(page);
    }
    // True if it was the last reference.
    bool drop(PageRef<G, T>&& ref) noexcept {
        Record& record = at(PageMint::melt(std::move(ref)));
        if (--record.references > 0) return false;
        referenced_ -= PageCount(1);
        cached_ += PageCount(1);
        return true;
    }
    bool referenced(PageId<G, T> page) const noexcept { return at(page).references > 0; }

    // Whether an unreferenced page may be evicted; one that may not waits for its children to go.
    // `first` puts it before all others.
    void offer(PageId<G, T> page, bool first) noexcept {
        sessions_.offer(lane_, node(page), first);
    }
    void withhold(PageId<G, T> page) noexcept { sessions_.withhold(lane_, node(page)); }
    // The content whose page is evicted next.
    std::optional<NodeId> coldest() const noexcept {
        return present() ? sessions_.coldest(lane_) : std::nullopt;
    }
    // Gives an unreferenced page back to the pool.
    void remove(PageId<G, T> page) noexcept {
        withhold(page);
        Record& record = at(page);
        assert(record.references == 0 && "a page that is referred to was removed");
        cached_ -= PageCount(1);
        pool_.give(std::move(*record.page));
        record = Record{};
    }

    // For audits: the reference count of a page, nothing if no sealed page has its number.
    std::optional<std::int32_t> references(PageId<G, T> page) const noexcept {
        if (!at(page).page) return std::nullopt;
        return at(page).references;
    }
    bool offered(PageId<G, T> page) const noexcept { return sessions_.offered(lane_, node(page)); }
    std::optional<const char*> broken() const {
        PageCount cached, referenced;
        for (std::size_t i = 0; i < records_.size(); ++i) {
            const Record& record = records_[i];
            if (!record.page) continue;
            (record.references > 0 ? referenced : cached) += PageCount(1);
            if (record.references > 0 && offered(PageId<G, T>(static_cast<std::int32_t>(i)))) {
                return "a page that is referred to may be evicted";
            }
        }
        if (cached != cached_) return "cached pages are miscounted";
        if (referenced != referenced_) return "referenced pages are miscounted";
        return std::nullopt;
    }

  private:
    struct Record {
        std::optional<SealedPage<G, T>> page;
        std::optional<NodeId> node;
        std::int32_t references = 0;
    };

    Record& at(PageId<G, T> page) noexcept {
        return records_[static_cast<std::size_t>(page.value)];
    }
    const Record& at(PageId<G, T> page) const noexcept {
        return records_[static_cast<std::size_t>(page.value)];
    }

    Sessions& sessions_;
    LaneId lane_;
    PagePool<G, T> pool_;
    std::vector<Record> records_;  // by page

    PageCount cached_;
    PageCount referenced_;
};

}  // namespace tokenspeed::control
