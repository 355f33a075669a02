#include "prefix_index.h"

#include <algorithm>
#include <bit>
#include <cassert>

namespace tokenspeed::control {

PrefixIndex::PrefixIndex(PagePool& pool, TokenCount page_size, bool shared)
    : pool_(pool),
      page_size_(page_size),
      shared_(shared),
      nodes_(static_cast<std::size_t>(pool.total().value)) {
    const auto pages = static_cast<std::size_t>(pool.total().value);
    if (shared) {
        tokens_.resize(pages * static_cast<std::size_t>(page_size.value));
        table_.resize(std::bit_ceil(2 * pages));
        heap_.reserve(pages);
    }
}

PrefixIndex::~PrefixIndex() {
    recording_ = false;
    clear();
    assert(referenced_ == PageCount(0) && "a request outlived the index");
}

std::span<std::int32_t> PrefixIndex::tokens_of(PageId page) noexcept {
    const auto size = static_cast<std::size_t>(page_size_.value);
    return std::span(tokens_).subspan(static_cast<std::size_t>(page.value) * size, size);
}

void PrefixIndex::match(std::span<const Hash128> hashes, std::span<const std::int32_t> tokens,
                        std::uint64_t salt, std::vector<PageRef>& run) noexcept {
    if (!shared_) return;
    const auto size = static_cast<std::size_t>(page_size_.value);
    std::optional<PageId> parent;
    for (std::size_t i = 0; i < hashes.size(); ++i) {
        const auto page = find({hashes[i], salt, tokens.subspan(i * size, size)}, parent);
        if (!page) return;
        run.push_back(refer(*page));
        parent = page;
    }
}

PageCount PrefixIndex::peek(std::span<const Hash128> hashes) const noexcept {
    // A page is cached only while its parent is, so the cached hashes are a prefix.
    const auto end = std::partition_point(hashes.begin(), hashes.end(),
                                          [&](const Hash128& hash) { return contains(hash); });
    return PageCount(static_cast<std::int32_t>(end - hashes.begin()));
}

PrefixIndex::Shelved PrefixIndex::shelve(SealedPage&& page, const PageRef* parent,
                                         const PageContent& content) {
    std::optional<PageId> before;
    if (parent != nullptr) before = parent->id();
    if (shared_) {
        if (const auto known = find(content, before)) return {refer(*known), std::move(page)};
    }
    const PageId id = page.id();
    Node& node = at(id);
    node.page.emplace(std::move(page));
    node.references = 1;
    referenced_ += PageCount(1);
    if (shared_) {
        node.hash = content.hash;
        node.salt = content.salt;
        node.parent = before;
        node.listed = true;
        std::ranges::copy(content.tokens, tokens_of(id).begin());
        if (before) ++at(*before).children;
        enlist(id);
        if (recording_) report_stored(id);
    }
    return {PageMint::mint<PageRef>(id), std::nullopt};
}

PageRef PrefixIndex::refer(PageId page) noexcept {
    Node& node = at(page);
    if (node.references++ == 0) {
        cached_ -= PageCount(1);
        referenced_ += PageCount(1);
        if (node.in_heap) heap_remove(page);
    }
    return PageMint::mint<PageRef>(page);
}

void PrefixIndex::release(std::vector<PageRef>&& run) noexcept {
    const std::uint64_t now = ++clock_;
    for (; !run.empty(); run.pop_back()) drop(std::move(run.back()), now);
}

void PrefixIndex::drop(PageRef&& ref, std::uint64_t now) noexcept {
    const PageId page = PageMint::melt(std::move(ref));
    Node& node = at(page);
    if (--node.references > 0) return;
    referenced_ -= PageCount(1);
    if (!node.listed) {
        pool_.give(std::move(*node.page));
        node.page.reset();
        return;
    }
    cached_ += PageCount(1);
    node.released = now;
    if (node.children == 0) heap_push(page);
}

bool PrefixIndex::evict() {
    if (heap_.empty()) return false;
    const PageId page = heap_.front();
    if (recording_) report_removed(page);
    heap_remove(page);
    delist(page);
    Node& node = at(page);
    if (node.parent) {
        Node& parent = at(*node.parent);
        if (--parent.children == 0 && parent.references == 0) heap_push(*node.parent);
    }
    pool_.give(std::move(*node.page));
    node = Node{};
    cached_ -= PageCount(1);
    ++evictions_;
    return true;
}

void PrefixIndex::clear() {
    // One event says it all when nothing stays behind.
    const bool whole = recording_ && referenced_ == PageCount(0);
    if (whole) {
        events_.kinds.push_back(CacheEvents::kCleared);
        events_.hashes.push_back(0);
        events_.parents.push_back(0);
        events_.has_parents.push_back(0);
        recording_ = false;
    }
    const std::int64_t evictions = evictions_;
    while (evict()) {
    }
    evictions_ = evictions;
    if (whole) recording_ = true;
}

// --- the table --------------------------------------------------------------------------------

std::optional<PageId> PrefixIndex::find(const PageContent& content,
                                        std::optional<PageId> parent) const noexcept {
    const auto size = static_cast<std::size_t>(page_size_.value);
    for (std::size_t place = home(content.hash); table_[place]; place = after(place)) {
        const PageId page = *table_[place];
        const Node& node = at(page);
        if (node.hash == content.hash && node.parent == parent && node.salt == content.salt &&
            std::equal(content.tokens.begin(), content.tokens.end(),
                       tokens_.begin() + static_cast<std::ptrdiff_t>(
                                             static_cast<std::size_t>(page.value) * size))) {
            return page;
        }
    }
    return std::nullopt;
}

bool PrefixIndex::contains(const Hash128& hash) const noexcept {
    if (!shared_) return false;
    for (std::size_t place = home(hash); table_[place]; place = after(place)) {
        if (at(*table_[place]).hash == hash) return true;
    }
    return false;
}

void PrefixIndex::enlist(PageId page) noexcept {
    std::size_t place = home(at(page).hash);
    while (table_[place]) place = after(place);
    table_[place] = page;
}

void PrefixIndex::delist(PageId page) noexcept {
    std::size_t hole = home(at(page).hash);
    while (table_[hole] != page) hole = after(hole);
    // Entries behind the hole move up while that brings them no farther than their home.
    for (std::size_t place = after(hole); table_[place]; place = after(place)) {
        const std::size_t wish = home(at(*table_[place]).hash);
        const std::size_t mask = table_.size() - 1;
        if (((place - wish) & mask) >= ((place - hole) & mask)) {
            table_[hole] = table_[place];
            hole = place;
        }
    }
    table_[hole].reset();
}

// --- the heap ---------------------------------------------------------------------------------

bool PrefixIndex::goes_before(PageId a, PageId b) const noexcept {
    return at(a).released != at(b).released ? at(a).released < at(b).released : a < b;
}

void PrefixIndex::heap_place(std::size_t place, PageId page) noexcept {
    heap_[place] = page;
    at(page).in_heap = place;
}

// Puts a page at a place, then up or down to where it belongs.
void PrefixIndex::heap_settle(std::size_t place, PageId page) noexcept {
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

void PrefixIndex::heap_push(PageId page) noexcept {
    heap_.push_back(page);  // Never allocates: reserved for every page.
    heap_settle(heap_.size() - 1, page);
}

void PrefixIndex::heap_remove(PageId page) noexcept {
    const std::size_t place = *at(page).in_heap;
    at(page).in_heap.reset();
    const PageId last = heap_.back();
    heap_.pop_back();
    if (last != page) heap_settle(place, last);
}

// --- events -----------------------------------------------------------------------------------

void PrefixIndex::report_stored(PageId page) {
    const Node& node = at(page);
    const auto tokens = tokens_of(page);
    events_.kinds.push_back(CacheEvents::kStored);
    events_.hashes.push_back(static_cast<std::int64_t>(node.hash.lo));
    events_.parents.push_back(node.parent ? static_cast<std::int64_t>(at(*node.parent).hash.lo)
                                          : 0);
    events_.has_parents.push_back(node.parent.has_value());
    events_.tokens.insert(events_.tokens.end(), tokens.begin(), tokens.end());
}

void PrefixIndex::report_removed(PageId page) {
    events_.kinds.push_back(CacheEvents::kRemoved);
    events_.hashes.push_back(static_cast<std::int64_t>(at(page).hash.lo));
    events_.parents.push_back(0);
    events_.has_parents.push_back(0);
}

void PrefixIndex::record(bool on) {
    if (on == recording_) return;
    recording_ = on;
    events_ = {};
    if (!on || !shared_) return;
    // Parents first: each page climbs to its root, and what was reported is passed over.
    std::vector<bool> reported(nodes_.size());
    std::vector<PageId> path;
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
        if (!nodes_[i].listed) continue;
        std::optional<PageId> page = PageId(static_cast<std::int32_t>(i));
        for (; page && !reported[static_cast<std::size_t>(page->value)]; page = at(*page).parent) {
            path.push_back(*page);
        }
        for (; !path.empty(); path.pop_back()) {
            report_stored(path.back());
            reported[static_cast<std::size_t>(path.back().value)] = true;
        }
    }
}

CacheEvents PrefixIndex::take_events() {
    return std::exchange(events_, {});
}

// --- audits -----------------------------------------------------------------------------------

std::optional<std::int32_t> PrefixIndex::references(PageId page) const noexcept {
    if (!at(page).page) return std::nullopt;
    return at(page).references;
}

std::optional<const char*> PrefixIndex::broken() const {
    std::vector<std::int32_t> children(nodes_.size());
    PageCount cached, referenced, listed;
    for (const Node& node : nodes_) {
        if (!node.page) continue;
        if (node.references > 0) {
            referenced += PageCount(1);
        } else {
            cached += PageCount(1);
        }
        if (!node.listed) continue;
        listed += PageCount(1);
        if (!node.parent) continue;
        ++children[static_cast<std::size_t>(node.parent->value)];
        const Node& parent = at(*node.parent);
        if (!parent.listed) return "a cached page lost its parent";
        if (node.references > parent.references) return "a page is referred to without its parent";
    }
    if (cached != cached_) return "cached pages are miscounted";
    if (referenced != referenced_) return "referenced pages are miscounted";
    PageCount found;
    for (const auto& entry : table_) {
        if (entry) found += PageCount(at(*entry).listed ? 1 : 0);
    }
    if (found != listed) return "the table and the pages disagree";
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
        const Node& node = nodes_[i];
        const PageId page(static_cast<std::int32_t>(i));
        if (node.children != children[i]) return "children are miscounted";
        const bool evictable = node.listed && node.references == 0 && node.children == 0;
        if (evictable != node.in_heap.has_value()) return "the heap is not the evictable leaves";
        if (node.in_heap && heap_[*node.in_heap] != page) return "the heap lost a page's place";
        if (node.in_heap && *node.in_heap > 0 &&
            goes_before(page, heap_[(*node.in_heap - 1) / 2])) {
            return "the heap is out of order";
        }
        if (node.listed && !shared_) return "a page is listed though sharing is off";
    }
    return std::nullopt;
}

}  // namespace tokenspeed::control
