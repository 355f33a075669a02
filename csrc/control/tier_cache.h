// The sealed pages of one cache group on one tier: who refers to them, and which may go first.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "pages.h"

namespace tokenspeed::control {

// Owns the pool and every sealed page; a page that nothing refers to may be evicted, least recently
// released first. Nothing allocates after the construction; look-ups are O(1), the rest O(log
// pages).
template <class G, class T>
class TierCache {
  public:
    using Id = PageId<G, T>;
    explicit TierCache(PageCount pages)
        : pool_(pages), records_(static_cast<std::size_t>(pages.value)) {
        heap_.reserve(records_.size());
    }
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
            if (record.place) heap_remove(page);
        }
        return PageMint::mint<PageRef<G, T>>(page);
    }
    // True if it was the last reference.
    bool drop(PageRef<G, T>&& ref, std::uint64_t now) noexcept {
        Record& record = at(PageMint::melt(std::move(ref)));
        if (--record.references > 0) return false;
        referenced_ -= PageCount(1);
        cached_ += PageCount(1);
        record.released = now;
        return true;
    }
    bool referenced(PageId<G, T> page) const noexcept { return at(page).references > 0; }

    // Whether an unreferenced page may be evicted; one that may not waits for its children to go.
    void offer(PageId<G, T> page) noexcept {
        if (!at(page).place) heap_push(page);
    }
    void withhold(PageId<G, T> page) noexcept {
        if (at(page).place) heap_remove(page);
    }
    // The page to evict next.
    std::optional<PageId<G, T>> coldest() const noexcept {
        if (heap_.empty()) return std::nullopt;
        return heap_.front();
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
    bool offered(PageId<G, T> page) const noexcept { return at(page).place.has_value(); }
    std::optional<const char*> broken() const {
        PageCount cached, referenced;
        std::size_t places = 0;
        for (std::size_t i = 0; i < records_.size(); ++i) {
            const Record& record = records_[i];
            if (!record.page) {
                if (record.place) return "a page that is not there may be evicted";
                continue;
            }
            (record.references > 0 ? referenced : cached) += PageCount(1);
            if (!record.place) continue;
            ++places;
            const PageId<G, T> page(static_cast<std::int32_t>(i));
            if (record.references > 0) return "a page that is referred to may be evicted";
            if (heap_[*record.place] != page) return "the heap lost a page's place";
            if (*record.place > 0 && goes_before(page, heap_[(*record.place - 1) / 2])) {
                return "the heap is out of order";
            }
        }
        if (places != heap_.size()) return "the heap holds what has no place in it";
        if (cached != cached_) return "cached pages are miscounted";
        if (referenced != referenced_) return "referenced pages are miscounted";
        return std::nullopt;
    }

  private:
    struct Record {
        std::optional<SealedPage<G, T>> page;
        std::optional<NodeId> node;
        std::int32_t references = 0;
        std::uint64_t released = 0;        // when the last reference went
        std::optional<std::size_t> place;  // in the heap, while it may be evicted
    };

    Record& at(PageId<G, T> page) noexcept {
        return records_[static_cast<std::size_t>(page.value)];
    }
    const Record& at(PageId<G, T> page) const noexcept {
        return records_[static_cast<std::size_t>(page.value)];
    }

    // A binary heap of what may be evicted, least recently released on top.
    bool goes_before(PageId<G, T> a, PageId<G, T> b) const noexcept {
        return at(a).released != at(b).released ? at(a).released < at(b).released : a < b;
    }
    void heap_place(std::size_t place, PageId<G, T> page) noexcept {
        heap_[place] = page;
        at(page).place = place;
    }
    // Puts a page at a place, then up or down to where it belongs.
    void heap_settle(std::size_t place, PageId<G, T> page) noexcept {
        while (place > 0 && goes_before(page, heap_[(place - 1) / 2])) {
            heap_place(place, heap_[(place - 1) / 2]);
            place = (place - 1) / 2;
        }
        for (std::size_t child; (child = 2 * place + 1) < heap_.size(); place = child) {
            if (child + 1 < heap_.size() && goes_before(heap_[child + 1], heap_[child])) ++child;
            if (!goes_before(heap_[child], page)) break;
            heap_place(place, heap_[child]);
        }
        heap_place(place, page);
    }
    void heap_push(PageId<G, T> page) noexcept {
        heap_.push_back(page);  // Never allocates: reserved for every page.
        heap_settle(heap_.size() - 1, page);
    }
    void heap_remove(PageId<G, T> page) noexcept {
        const std::size_t place = *at(page).place;
        at(page).place.reset();
        const PageId<G, T> last = heap_.back();
        heap_.pop_back();
        if (last != page) heap_settle(place, last);
    }

    PagePool<G, T> pool_;
    std::vector<Record> records_;  // by page
    std::vector<PageId<G, T>> heap_;
    PageCount cached_;
    PageCount referenced_;
};

}  // namespace tokenspeed::control
