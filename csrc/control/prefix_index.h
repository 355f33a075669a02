// The prefix index: sealed pages by content, shared by counted references, evicted leaf first.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "hash.h"
#include "pages.h"

namespace tokenspeed::control {

// What is cached changed; plain values for whoever routes by it. Hashes are the low 64 bits.
struct CacheEvents {
    enum Kind : std::int32_t { kStored = 0, kRemoved = 1, kCleared = 2 };
    std::vector<std::int32_t> kinds;
    std::vector<std::int64_t> hashes;
    std::vector<std::int64_t> parents;      // 0 where there is none
    std::vector<std::uint8_t> has_parents;  // 1 where the page continues another
    std::vector<std::int32_t> tokens;       // page_size of them for each stored page
};

// The content of one page: its tokens, and everything before them through hash and salt.
struct PageContent {
    Hash128 hash;
    std::uint64_t salt;
    std::span<const std::int32_t> tokens;
};

// Owns every sealed page. A page is found by its content: chained hash, then parent, salt and
// tokens, so that no collision ever serves another prompt's KV. Each content is held once.
//
// Whoever refers to a page refers to all pages before it, so an unreferenced page has only
// unreferenced pages after it: everything unreferenced can go, leaves before their parents, least
// recently released first. Look-up, release and eviction of a page are O(1) or O(log pages) and
// allocate nothing.
class PrefixIndex {
  public:
    // Off, sealed pages are neither found nor kept.
    PrefixIndex(PagePool& pool, TokenCount page_size, bool shared);
    PrefixIndex(const PrefixIndex&) = delete;
    PrefixIndex& operator=(const PrefixIndex&) = delete;
    ~PrefixIndex();

    // Takes a reference to each page of the longest cached run of `hashes`, one hash per page of
    // `tokens`, and appends it to `run`, whose capacity must suffice.
    void match(std::span<const Hash128> hashes, std::span<const std::int32_t> tokens,
               std::uint64_t salt, std::vector<PageRef>& run) noexcept;

    // Length of the run `match` would find, without taking it; by hash alone. O(log pages).
    PageCount peek(std::span<const Hash128> hashes) const noexcept;

    struct Shelved {
        PageRef ref;                          // to the page that holds this content
        std::optional<SealedPage> duplicate;  // the page brought, if another held it already
    };
    // `parent` is the page before it in the same request, if it is not the first.
    [[nodiscard]] Shelved shelve(SealedPage&& page, const PageRef* parent,
                                 const PageContent& content);

    // Gives back references, the deepest page first, all as recently used as each other.
    void release(std::vector<PageRef>&& run) noexcept;

    // Frees the least recently released leaf that nothing refers to.
    bool evict();
    // Frees every page that nothing refers to.
    void clear();

    PageCount cached_count() const noexcept { return cached_; }  // unreferenced, evictable
    PageCount referenced_count() const noexcept { return referenced_; }
    std::int64_t evictions() const noexcept { return evictions_; }

    // Switching on first reports the present content, parents before children.
    void record(bool on);
    CacheEvents take_events();

    // For audits: the reference count of a page, nothing if the index does not own it.
    std::optional<std::int32_t> references(PageId page) const noexcept;
    // For audits: the first broken invariant, nothing if all hold.
    std::optional<const char*> broken() const;

  private:
    struct Node {
        std::optional<SealedPage> page;
        Hash128 hash{};
        std::uint64_t salt = 0;
        std::optional<PageId> parent;
        std::int32_t references = 0;
        std::int32_t children = 0;
        std::uint64_t released = 0;          // when the last reference went
        std::optional<std::size_t> in_heap;  // where, while it may be evicted
        bool listed = false;
    };

    Node& at(PageId page) noexcept { return nodes_[static_cast<std::size_t>(page.value)]; }
    const Node& at(PageId page) const noexcept {
        return nodes_[static_cast<std::size_t>(page.value)];
    }
    std::span<std::int32_t> tokens_of(PageId page) noexcept;
    std::optional<PageId> find(const PageContent& content,
                               std::optional<PageId> parent) const noexcept;
    bool contains(const Hash128& hash) const noexcept;
    PageRef refer(PageId page) noexcept;
    void drop(PageRef&& ref, std::uint64_t now) noexcept;
    void report_stored(PageId page);
    void report_removed(PageId page);

    // An open-addressed table from hash to page: linear probing, at most half full.
    std::size_t home(const Hash128& hash) const noexcept { return hash.lo & (table_.size() - 1); }
    std::size_t after(std::size_t place) const noexcept {
        return (place + 1) & (table_.size() - 1);
    }
    void enlist(PageId page) noexcept;
    void delist(PageId page) noexcept;

    // A binary heap of the evictable leaves, least recently released on top.
    bool goes_before(PageId a, PageId b) const noexcept;
    void heap_place(std::size_t place, PageId page) noexcept;
    void heap_settle(std::size_t place, PageId page) noexcept;
    void heap_push(PageId page) noexcept;
    void heap_remove(PageId page) noexcept;

    PagePool& pool_;
    TokenCount page_size_;
    bool shared_;
    std::vector<Node> nodes_;           // by page
    std::vector<std::int32_t> tokens_;  // by page, page_size each
    std::vector<std::optional<PageId>> table_;
    std::vector<PageId> heap_;
    PageCount cached_;
    PageCount referenced_;
    std::uint64_t clock_ = 0;
    std::int64_t evictions_ = 0;
    bool recording_ = false;
    CacheEvents events_;
};

}  // namespace tokenspeed::control
