#include "prefix_index.h"

#include <algorithm>
#include <cassert>

namespace tokenspeed::control {

namespace {

const GroupConfig* find_group(std::span<const GroupConfig> groups, GroupKind kind) {
    const auto found = std::ranges::find(groups, kind, &GroupConfig::kind);
    return found == groups.end() ? nullptr : &*found;
}

PageCount device_pages(std::span<const GroupConfig> groups, GroupKind kind) {
    const GroupConfig* group = find_group(groups, kind);
    return PageCount(group != nullptr ? group->pages : 0);
}

PageCount host_pages(std::span<const GroupConfig> groups, GroupKind kind, bool shared) {
    const GroupConfig* group = find_group(groups, kind);
    return PageCount(group != nullptr && shared ? group->host_pages : 0);
}

// A node for every page, and for every page of content that a running or parked request links to
// though no group keeps it any more: no more are parked than may run. Beyond that, `enter` evicts.
std::size_t nodes_max(std::span<const GroupConfig> groups, TokenCount page_size,
                      std::int32_t slots_max, TokenCount context_max) {
    std::size_t nodes = 0;
    bool whole = false;
    for (const GroupConfig& group : groups) {
        nodes += static_cast<std::size_t>(group.pages) + static_cast<std::size_t>(group.host_pages);
        whole = whole || group.kind == GroupKind::kFull || group.kind == GroupKind::kLatent;
    }
    if (!whole) {
        nodes += 2 * static_cast<std::size_t>(slots_max) *
                 static_cast<std::size_t>(pages_for(context_max, page_size).value);
    }
    return nodes;
}

GroupKind lead(std::span<const GroupConfig> groups) {
    for (const GroupKind kind : {GroupKind::kFull, GroupKind::kLatent, GroupKind::kWindow}) {
        if (find_group(groups, kind) != nullptr) return kind;
    }
    return GroupKind::kRecurrent;
}

}  // namespace

PrefixIndex::PrefixIndex(std::span<const GroupConfig> groups, TokenCount page_size,
                         std::int32_t slots_max, TokenCount context_max, bool shared,
                         CachePolicy policy)
    : page_size_(page_size),
      window_(1),
      lead_(lead(groups)),
      sessions_(nodes_max(groups, page_size, slots_max, context_max), policy),
      tree_(nodes_max(groups, page_size, slots_max, context_max), page_size, shared, sessions_),
      tiers_{
          .full = {TierCache<Full, Device>(device_pages(groups, GroupKind::kFull), sessions_),
                   TierCache<Full, Host>(host_pages(groups, GroupKind::kFull, shared), sessions_)},
          .window = {TierCache<Window, Device>(device_pages(groups, GroupKind::kWindow), sessions_),
                     TierCache<Window, Host>(host_pages(groups, GroupKind::kWindow, shared),
                                             sessions_)},
          .latent = {TierCache<Latent, Device>(device_pages(groups, GroupKind::kLatent), sessions_),
                     TierCache<Latent, Host>(host_pages(groups, GroupKind::kLatent, shared),
                                             sessions_)},
          .recurrent = {
              TierCache<Recurrent, Device>(device_pages(groups, GroupKind::kRecurrent), sessions_),
              TierCache<Recurrent, Host>(host_pages(groups, GroupKind::kRecurrent, shared),
                                         sessions_)}} {
    if (const auto* group = find_group(groups, GroupKind::kWindow)) {
        window_ = TokenCount(group->window);
    }
    if (const auto* group = find_group(groups, GroupKind::kRecurrent)) {
        checkpoint_pages_ = group->checkpoint_pages;
    }
    each_group([&]<class G>() {
        leaving<G>().reserve(static_cast<std::size_t>(tier<G, Host>().pool().total().value));
    });
}

PrefixIndex::~PrefixIndex() {
    recording_ = false;
    clear();
    each_group([&]<class G>() {
        for (auto& leaving : leaving<G>()) {
            tree_.prune(tree_.unlink(std::move(leaving.node)));
            tier<G, Host>().pool().give(std::move(leaving.target));
        }
        assert((tier<G, Device>().referenced_count() == PageCount(0)) &&
               "a request outlived the index");
    });
}

// --- content ------------------------------------------------------------------------------------

std::size_t PrefixIndex::match(std::span<const Hash128> hashes,
                               std::span<const std::int32_t> tokens, std::uint64_t salt, bool host,
                               std::vector<NodeId>& path) const noexcept {
    const auto size = static_cast<std::size_t>(page_size_.value);
    std::optional<NodeId> parent;
    for (std::size_t i = 0; i < hashes.size(); ++i) {
        const auto node = tree_.find({hashes[i], salt, tokens.subspan(i * size, size)}, parent);
        if (!node) break;
        if (has<Full>() && !held<Full>(*node, host)) break;
        if (has<Latent>() && !held<Latent>(*node, host)) break;
        path.push_back(*node);
        parent = node;
    }
    // Shortened until the window before its end is there, and the state at its end.
    for (std::size_t pages = path.size(); pages > 0;) {
        std::size_t shorter = pages;
        if (has<Recurrent>() && !held<Recurrent>(path[pages - 1], host)) shorter = pages - 1;
        if (has<Window>() && shorter == pages) {
            const TokenCount written(static_cast<std::int32_t>(pages) * page_size_.value);
            const std::size_t begin = window_begin(written);
            for (std::size_t i = pages; i > begin && shorter == pages; --i) {
                // Without this page no run can end behind it and still within its reach.
                if (!held<Window>(path[i - 1], host)) shorter = i - 1;
            }
        }
        if (shorter == pages) return pages;
        pages = shorter;
    }
    return 0;
}

PageCount PrefixIndex::peek(std::span<const Hash128> hashes) const noexcept {
    // A node stays while another continues it, so the known hashes are a prefix.
    const auto end = std::partition_point(hashes.begin(), hashes.end(), [&](const Hash128& hash) {
        return tree_.find(hash).has_value();
    });
    return PageCount(static_cast<std::int32_t>(end - hashes.begin()));
}

BranchId PrefixIndex::begin(std::span<const Hash128> hashes, std::int64_t now_us) {
    const auto known = static_cast<std::size_t>(peek(hashes).value);
    Opening opening{.deepest = {},
                    .inside = false,
                    .known = static_cast<std::int32_t>(known),
                    .next = {},
                    .pages = static_cast<std::int32_t>(hashes.size())};
    if (known > 0) {
        opening.deepest = tree_.find(hashes[known - 1]);
        opening.inside = tree_.last_child(*opening.deepest).has_value();
    }
    if (known < hashes.size()) opening.next = hashes[known];
    return sessions_.begin(opening, now_us);
}

NodeRef PrefixIndex::enter(const PageContent& content, const NodeRef* parent,
                           BranchId branch) noexcept {
    std::optional<NodeId> before;
    if (parent != nullptr) before = parent->id();
    while (tree_.full() && evict_any()) {
    }
    return tree_.enter(content, before, branch);
}

void PrefixIndex::release(std::vector<NodeRef>&& trail) noexcept {
    std::optional<BranchId> branch;
    for (auto ref = trail.rbegin(); ref != trail.rend(); ++ref) {
        if (!tree_.listed(ref->id())) continue;
        if (!branch) branch = sessions_.branch(ref->id());
        sessions_.used(ref->id(), *branch);
    }
    for (; !trail.empty(); trail.pop_back()) tree_.prune(tree_.unlink(std::move(trail.back())));
}

// --- pages --------------------------------------------------------------------------------------

template <class G, class T>
void PrefixIndex::settle(NodeId node, bool behind) noexcept {
    const Copy<G, T>& copy = tree_.copy<G, T>(node);
    if (!copy.page) return;
    const bool last = !kWhole<G> || copy.children == 0;
    if (last && tree_.listed(node) && !tier<G, T>().referenced(*copy.page)) {
        tier<G, T>().offer(*copy.page, behind);
    } else {
        tier<G, T>().withhold(*copy.page);
    }
}

template <class G, class T>
void PrefixIndex::settle_parent(NodeId node) noexcept {
    if constexpr (kWhole<G>) {
        if (const auto parent = tree_.parent(node)) settle<G, T>(*parent);
    }
}

template <class G, class T>
PageId<G, T> PrefixIndex::put(SealedPage<G, T>&& page, NodeId node) noexcept {
    const bool news = leads<G>() && !held<G>(node, true);
    const PageId<G, T> id = tier<G, T>().keep(std::move(page), node);
    tree_.place<G, T>(node, id);
    settle_parent<G, T>(node);
    if (news && recording_) report_stored(node);
    return id;
}

template <class G, class T>
void PrefixIndex::discard(NodeId node) noexcept {
    const PageId<G, T> page = *tree_.copy<G, T>(node).page;
    tree_.displace<G, T>(node);
    tier<G, T>().remove(page);
    settle_parent<G, T>(node);
    if (leads<G>() && recording_ && tree_.listed(node) && !held<G>(node, true)) {
        report_removed(node);
    }
    if (kWhole<G> && leads<G>() && !held<G>(node, true)) abandon(node);
    tree_.prune(node);
}

void PrefixIndex::abandon(NodeId node) noexcept {
    // Somebody is about to bring the content back, or goes on from here.
    if (tree_.links(node) != 0) return;
    NodeRef guard = tree_.link(node);
    for (NodeId leaf = tree_.leaf_below(node); leaf != node; leaf = tree_.leaf_below(node)) {
        // A copy on its way to the host, or from it, keeps the leaf until it is there.
        NodeRef held_back = tree_.link(leaf);
        each_group([&]<class G>() {
            const auto drop = [&]<class T>() {
                const auto page = tree_.copy<G, T>(leaf).page;
                if (page && !tier<G, T>().referenced(*page)) discard<G, T>(leaf);
            };
            drop.template operator()<Device>();
            drop.template operator()<Host>();
        });
        tree_.detach(leaf);
        tree_.prune(tree_.unlink(std::move(held_back)));
    }
    static_cast<void>(tree_.unlink(std::move(guard)));
}

template <class G>
PrefixIndex::Shelved<G> PrefixIndex::shelve(SealedPage<G>&& page, const NodeRef& node) noexcept {
    if (auto known = refer<G, Device>(node.id())) return {std::move(*known), std::move(page)};
    return {tier<G, Device>().refer(put<G, Device>(std::move(page), node.id())), std::nullopt};
}

template <class G, class T>
void PrefixIndex::release(PageRef<G, T>&& ref, bool behind) noexcept {
    const NodeId node = tier<G, T>().node(ref.id());
    if (!tier<G, T>().drop(std::move(ref))) return;
    if (tree_.listed(node)) {
        settle<G, T>(node, behind);
    } else {
        discard<G, T>(node);
    }
}

template <class G, class T>
bool PrefixIndex::evict(bool keep) noexcept {
    const auto coldest = tier<G, T>().coldest();
    if (!coldest) return false;
    const NodeId node = *coldest;
    if constexpr (std::is_same_v<T, Device>) {
        if (keep && tier<G, Host>().present() && !tree_.copy<G, Host>(node).page) {
            if (auto room = take<G, Host>()) {
                leaving<G>().push_back(
                    {tree_.link(node), *tree_.copy<G, T>(node).page, open(std::move(*room))});
                ++stores_;
            }
        }
        ++evictions_;
    }
    discard<G, T>(node);
    return true;
}

template <class G>
void PrefixIndex::stow(Storing<G>&& stored, const Retired& done) noexcept {
    OpenPage<G, Host> page = reclaim(std::move(stored.target), done);
    const NodeId node = stored.node.id();
    if (tree_.copy<G, Host>(node).page || !tree_.listed(node)) {
        tier<G, Host>().pool().give(std::move(page));
    } else {
        put<G, Host>(seal(std::move(page), done), node);
        settle<G, Host>(node);
    }
    tree_.prune(tree_.unlink(std::move(stored.node)));
}

bool PrefixIndex::evict_any() noexcept {
    bool gone = false;
    each_group([&]<class G>() { gone = gone || evict<G, Host>(false) || evict<G, Device>(false); });
    return gone;
}

void PrefixIndex::clear() noexcept {
    // One event says it all when nothing stays behind.
    bool whole = recording_;
    each_group([&]<class G>() {
        whole = whole && tier<G, Device>().referenced_count() == PageCount(0) &&
                tier<G, Host>().referenced_count() == PageCount(0) && leaving<G>().empty();
    });
    if (whole) {
        events_.kinds.push_back(CacheEvents::kCleared);
        events_.hashes.push_back(0);
        events_.parents.push_back(0);
        events_.has_parents.push_back(0);
        recording_ = false;
    }
    const std::int64_t evictions = evictions_;
    while (evict_any()) {
    }
    evictions_ = evictions;
    if (whole) recording_ = true;
}

PageCounts PrefixIndex::cached_counts() const noexcept {
    PageCounts counts;
    each_group([&]<class G>() { counts.of<G>() = tier<G, Device>().cached_count(); });
    return counts;
}

// --- events -------------------------------------------------------------------------------------

void PrefixIndex::report_stored(NodeId node) {
    const auto tokens = tree_.tokens(node);
    const auto parent = tree_.parent(node);
    events_.kinds.push_back(CacheEvents::kStored);
    events_.hashes.push_back(static_cast<std::int64_t>(tree_.hash(node).lo));
    events_.parents.push_back(parent ? static_cast<std::int64_t>(tree_.hash(*parent).lo) : 0);
    events_.has_parents.push_back(parent.has_value());
    events_.tokens.insert(events_.tokens.end(), tokens.begin(), tokens.end());
}

void PrefixIndex::report_removed(NodeId node) {
    events_.kinds.push_back(CacheEvents::kRemoved);
    events_.hashes.push_back(static_cast<std::int64_t>(tree_.hash(node).lo));
    events_.parents.push_back(0);
    events_.has_parents.push_back(0);
}

void PrefixIndex::record(bool on) {
    on = on && tree_.shared();  // What nobody can find is nobody's news.
    if (on == recording_) return;
    recording_ = on;
    events_ = {};
    if (!on) return;
    // Parents first: each node climbs to its root, and what was reported is passed over.
    std::vector<bool> reported(tree_.capacity());
    std::vector<NodeId> path;
    for (std::size_t i = 0; i < tree_.capacity(); ++i) {
        const NodeId here(static_cast<std::int32_t>(i));
        if (!tree_.listed(here)) continue;
        std::optional<NodeId> node = here;
        for (; node && !reported[static_cast<std::size_t>(node->value)];
             node = tree_.parent(*node)) {
            path.push_back(*node);
        }
        for (; !path.empty(); path.pop_back()) {
            reported[static_cast<std::size_t>(path.back().value)] = true;
            bool present = false;
            each_group([&]<class G>() {
                present = present || (leads<G>() && held<G>(path.back(), true));
            });
            if (present) report_stored(path.back());
        }
    }
}

CacheEvents PrefixIndex::take_events() {
    return std::exchange(events_, {});
}

// --- audits -------------------------------------------------------------------------------------

std::optional<const char*> PrefixIndex::broken() const {
    auto broken = tree_.broken();
    if (!broken) broken = sessions_.broken();
    const auto check = [&]<class G, class T>() {
        const TierCache<G, T>& cache = tier<G, T>();
        if (!broken) broken = cache.broken();
        PageCount placed;
        for (std::size_t i = 0; i < tree_.capacity() && cache.present() && !broken; ++i) {
            const NodeId node(static_cast<std::int32_t>(i));
            const Copy<G, T>& copy = tree_.copy<G, T>(node);
            if (!copy.page) continue;
            placed += PageCount(1);
            if (!cache.references(*copy.page)) {
                broken = "a node holds a page that is not sealed";
            } else if (cache.node(*copy.page) != node) {
                broken = "a page and its node disagree";
            } else {
                const bool last = !kWhole<G> || copy.children == 0;
                const bool evictable =
                    last && tree_.listed(node) && *cache.references(*copy.page) == 0;
                if (evictable != cache.offered(*copy.page)) {
                    broken = "what may be evicted is not what is offered";
                }
            }
            const auto parent = tree_.parent(node);
            if (kWhole<G> && std::is_same_v<T, Device> && parent && !broken) {
                const auto before = tree_.copy<G, T>(*parent).page;
                if (!before) {
                    broken = "a page stayed on the device without the page before it";
                } else if (*cache.references(*before) < *cache.references(*copy.page)) {
                    broken = "a page is referred to without the page before it";
                }
            }
        }
        if (!broken && placed != cache.cached_count() + cache.referenced_count()) {
            broken = "a sealed page has no node";
        }
    };
    each_group([&]<class G>() {
        check.template operator()<G, Device>();
        check.template operator()<G, Host>();
    });
    return broken;
}

#define TOKENSPEED_FOR_GROUP(G)                                                    \
    template PrefixIndex::Shelved<G> PrefixIndex::shelve(SealedPage<G>&&,          \
                                                         const NodeRef&) noexcept; \
    template void PrefixIndex::stow(Storing<G>&&, const Retired&) noexcept;        \
    template void PrefixIndex::release(PageRef<G, Device>&&, bool) noexcept;       \
    template void PrefixIndex::release(PageRef<G, Host>&&, bool) noexcept;         \
    template bool PrefixIndex::evict<G, Device>(bool) noexcept;                    \
    template bool PrefixIndex::evict<G, Host>(bool) noexcept;
TOKENSPEED_FOR_GROUP(Full)
TOKENSPEED_FOR_GROUP(Window)
TOKENSPEED_FOR_GROUP(Latent)
TOKENSPEED_FOR_GROUP(Recurrent)
#undef TOKENSPEED_FOR_GROUP

}  // namespace tokenspeed::control
