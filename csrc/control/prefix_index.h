// The prefix index: sealed pages by content, for every cache group and tier.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "content_tree.h"
#include "tier_cache.h"

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

// A page that left the device, on its way to the host: the next launched step copies it first,
// before anything can write to where it was.
template <class G>
struct Leaving {
    NodeRef node;
    PageId<G> source;
    OpenPage<G, Host> target;
};
// The copy, lent to the step that makes it.
template <class G>
struct Storing {
    NodeRef node;
    InFlight<OpenPage<G, Host>> target;
};

// Where the tokens of a prompt came from. Those not cached: evicted before, or known though a group
// lacks its part; never seen; and the tail, which fills no page, or the last page, which is
// computed for its logits.
struct CacheReport {
    TokenCount cached, evicted, unseen, tail;
    // So many tokens the cache holds or held, as far as it can tell: where the prompt leaves it.
    TokenCount divergence;
    // The prompt opens like cached content of another salt. For the operator alone: a tenant must
    // not learn what others asked, so to the request these tokens are unseen.
    bool other_salt = false;
};

// Owns every page of every group and tier; those in use by requests are lent to them. A content is
// held once a group and tier, and found while every group holds what a prompt needs of it: all
// pages of a full or latent group, the last window of a sliding one, a checkpoint of a recurrence.
//
// Of a full or latent group, whoever refers to a page refers to all pages before it, and a page
// goes only after those that continue it. What leaves the device goes to the host where there is
// one.
class PrefixIndex {
  public:
    // Not shared, sealed pages are neither found nor kept.
    PrefixIndex(std::span<const GroupConfig> groups, TokenCount page_size, std::int32_t slots_max,
                TokenCount context_max, bool shared, CachePolicy policy);
    PrefixIndex(const PrefixIndex&) = delete;
    PrefixIndex& operator=(const PrefixIndex&) = delete;
    ~PrefixIndex();

    template <class G>
    bool has() const noexcept {
        return tier<G, Device>().present();
    }
    template <class G, class T = Device>
    TierCache<G, T>& tier() noexcept {
        return pick<T>(tiers_.template of<G>());
    }
    template <class G, class T = Device>
    const TierCache<G, T>& tier() const noexcept {
        return pick<T>(tiers_.template of<G>());
    }
    const ContentTree& tree() const noexcept { return tree_; }
    Sessions& sessions() noexcept { return sessions_; }
    const Sessions& sessions() const noexcept { return sessions_; }

    // --- pages ---

    // A free page, evicting for it if need be.
    template <class G, class T = Device>
    [[nodiscard]] std::optional<FreePage<G, T>> take() noexcept {
        if (tier<G, T>().free_count() == PageCount(0)) evict<G, T>(true);
        return tier<G, T>().pool().take();
    }
    template <class G>
    PageCount available() const noexcept {
        return tier<G, Device>().available();
    }
    template <class G, class P>
    void give(P&& page) noexcept {
        tier<G, Device>().pool().give(std::forward<P>(page));
    }

    // The first page of a window group that a token after `written` others may still read.
    std::size_t window_begin(TokenCount written) const noexcept {
        const std::int32_t first = written.value - window_.value + 1;
        return first <= 0 ? 0 : static_cast<std::size_t>(first / page_size_.value);
    }
    // Pages between two kept states of a recurrence.
    std::int32_t checkpoint_pages() const noexcept { return checkpoint_pages_; }

    // --- content ---

    // The longest run of pages that every group can serve, `path` the nodes of as many or more;
    // `path` must have room for all hashes. `host` says whether the host's copies count.
    std::size_t match(std::span<const Hash128> hashes, std::span<const std::int32_t> tokens,
                      std::uint64_t salt, bool host, std::vector<NodeId>& path) const noexcept;
    // About as long a run, by hash alone. O(log pages).
    PageCount peek(std::span<const Hash128> hashes) const noexcept;
    // Why a prompt of which so much was cached has to be computed for the rest. Before its
    // admission enters anything. O(pages known) and O(1) in what other salts hold.
    CacheReport explain(std::span<const Hash128> hashes, std::span<const std::int32_t> prompt,
                        TokenCount cached) const noexcept;
    // Whose turn a prompt is, by the hashes of its full pages. O(log pages).
    [[nodiscard]] BranchId begin(std::span<const Hash128> hashes, std::int64_t now_us);

    NodeRef link(NodeId node) noexcept { return tree_.link(node); }
    // The node of a page's content, made if it is not there.
    NodeRef enter(const PageContent& content, const NodeRef* parent, BranchId branch) noexcept;
    // Gives back a request's trail; what is on it was last used by the branch of its last page.
    void release(std::vector<NodeRef>&& trail) noexcept;

    // A reference to what a tier holds of a node.
    template <class G, class T>
    std::optional<PageRef<G, T>> refer(NodeId node) noexcept {
        const auto page = tree_.copy<G, T>(node).page;
        if (!page) return std::nullopt;
        return tier<G, T>().refer(*page);
    }
    template <class G>
    struct Shelved {
        PageRef<G> ref;                          // to the page that holds this content
        std::optional<SealedPage<G>> duplicate;  // the page brought, if another held it already
    };
    template <class G>
    [[nodiscard]] Shelved<G> shelve(SealedPage<G>&& page, const NodeRef& node) noexcept;

    // Gives back references, the deepest page first.
    template <class G, class T>
    void release(std::vector<PageRef<G, T>>&& run) noexcept {
        for (; !run.empty(); run.pop_back()) release(std::move(run.back()), false);
    }
    template <class G, class T>
    void release(PageRef<G, T>&& ref) noexcept {
        release(std::move(ref), false);
    }
    // What fell behind the window will hardly be wanted again, and goes first.
    void release_behind(PageRef<Window>&& ref) noexcept { release(std::move(ref), true); }

    // --- tiers ---

    template <class G>
    std::vector<Leaving<G>>& leaving() noexcept {
        return leaving_.template of<G>();
    }
    template <class G>
    const std::vector<Leaving<G>>& leaving() const noexcept {
        return leaving_.template of<G>();
    }
    // The step that made the copy has retired.
    template <class G>
    void stow(Storing<G>&& stored, const Retired& done) noexcept;

    // Frees every page that nothing refers to, on every tier.
    void clear() noexcept;

    PageCounts cached_counts() const noexcept;
    std::int64_t evictions() const noexcept { return evictions_; }
    std::int64_t stores() const noexcept { return stores_; }

    // Switching on first reports the present content, parents before children.
    void record(bool on);
    CacheEvents take_events();

    // For audits: the first broken invariant, nothing if all hold.
    std::optional<const char*> broken() const;

  private:
    template <class G>
    struct Tiers {
        TierCache<G, Device> device;
        TierCache<G, Host> host;
    };
    template <class T, class Both>
    static auto& pick(Both& tiers) noexcept {
        if constexpr (std::is_same_v<T, Device>) {
            return tiers.device;
        } else {
            return tiers.host;
        }
    }
    template <class G>
    bool leads() const noexcept {
        return G::kKind == lead_;
    }
    template <class G>
    bool held(NodeId node, bool host) const noexcept {
        return tree_.copy<G, Device>(node).page || (host && tree_.copy<G, Host>(node).page);
    }

    template <class G, class T>
    void release(PageRef<G, T>&& ref, bool behind) noexcept;
    template <class G, class T>
    bool evict(bool keep) noexcept;
    // Offers a page to eviction, or withholds it, as its references and children are.
    template <class G, class T>
    void settle(NodeId node, bool behind = false) noexcept;
    template <class G, class T>
    void settle_parent(NodeId node) noexcept;
    template <class G, class T>
    PageId<G, T> put(SealedPage<G, T>&& page, NodeId node) noexcept;
    template <class G, class T>
    void discard(NodeId node) noexcept;
    bool evict_any() noexcept;
    // The node's content is lost, and what continues it is of no use without it.
    void abandon(NodeId node) noexcept;
    void report_stored(NodeId node);
    void report_removed(NodeId node);

    TokenCount page_size_;
    TokenCount window_;
    std::int32_t checkpoint_pages_ = 1;
    GroupKind lead_;  // the group whose pages stand for the content when it is reported
    Sessions sessions_;
    ContentTree tree_;
    PerGroup<Tiers> tiers_;
    template <class G>
    using LeavingList = std::vector<Leaving<G>>;
    PerGroup<LeavingList> leaving_;

    std::int64_t evictions_ = 0;
    std::int64_t stores_ = 0;
    bool recording_ = false;
    CacheEvents events_;
};

}  // namespace tokenspeed::control
