// The content tree: what pages hold, as a tree of prompts, apart from where they hold it.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "groups.h"
#include "hash.h"
#include "ids.h"
#include "linear.h"
#include "openings.h"
#include "sessions.h"

namespace tokenspeed::control {

// The content of one page: its tokens, and everything before them through hash and salt.
struct PageContent {
    Hash128 hash;
    std::uint64_t salt;
    std::span<const std::int32_t> tokens;
};

// Keeps a node of the tree in place.
class [[nodiscard]] NodeRef : public Linear<NodeId> {
  public:
    NodeRef(NodeRef&&) noexcept = default;
    NodeRef& operator=(NodeRef&&) noexcept = default;

  private:
    friend class ContentTree;
    explicit NodeRef(NodeId id) noexcept : Linear(id) {}
};

// Where a node's content lies in one group and tier, and how many of its children lie there.
template <class G, class T>
struct Copy {
    std::optional<PageId<G, T>> page;
    std::int32_t children = 0;
};
template <class G>
struct Copies {
    Copy<G, Device> device;
    Copy<G, Host> host;
};

// A node is a page's worth of tokens after all those before it. It is found by its content: chained
// hash, then parent, salt and tokens, so that no collision ever serves another prompt's KV. It
// stays while anything links to it, continues it, or holds a copy of it. Nothing allocates after
// the construction.
class ContentTree {
  public:
    // Unlisted (not shared), nodes are never found.
    ContentTree(std::size_t nodes_max, TokenCount page_size, bool shared, Sessions& sessions);
    ContentTree(const ContentTree&) = delete;
    ContentTree& operator=(const ContentTree&) = delete;

    bool shared() const noexcept { return shared_; }
    bool full() const noexcept { return free_.empty(); }

    std::optional<NodeId> find(const PageContent& content,
                               std::optional<NodeId> parent) const noexcept;
    // By hash alone.
    std::optional<NodeId> find(const Hash128& hash) const noexcept;

    NodeRef link(NodeId node) noexcept;
    // Does not remove the node: see `prune`.
    NodeId unlink(NodeRef&& ref) noexcept;
    // The node of a content: there already, or new and the branch's. The tree must not be full.
    NodeRef enter(const PageContent& content, std::optional<NodeId> parent,
                  BranchId branch) noexcept;
    // Removes the node if nothing keeps it, then its parent likewise.
    void prune(NodeId node) noexcept;
    // Cuts a node without children off the tree: whatever still keeps it, nothing finds it again.
    void detach(NodeId node) noexcept;
    // A node without children at or below a node.
    NodeId leaf_below(NodeId node) const noexcept;

    template <class G, class T>
    Copy<G, T>& copy(NodeId node) noexcept {
        return pick<T>(at(node).copies.template of<G>());
    }
    template <class G, class T>
    const Copy<G, T>& copy(NodeId node) const noexcept {
        return pick<T>(at(node).copies.template of<G>());
    }
    // Says that a copy came or went; children of the parent are counted.
    template <class G, class T>
    void place(NodeId node, PageId<G, T> page) noexcept {
        copy<G, T>(node).page = page;
        if (const auto before = parent(node)) ++copy<G, T>(*before).children;
    }
    template <class G, class T>
    void displace(NodeId node) noexcept {
        copy<G, T>(node).page.reset();
        if (const auto before = parent(node)) --copy<G, T>(*before).children;
    }

    bool listed(NodeId node) const noexcept { return at(node).listed; }
    // Whether a prompt of some salt opens with these tokens.
    bool opens_elsewhere(std::span<const std::int32_t> page) const noexcept {
        return openings_.contains(page);
    }
    // The child that came last, if there is one.
    std::optional<NodeId> last_child(NodeId node) const noexcept { return at(node).first_child; }
    std::optional<NodeId> parent(NodeId node) const noexcept { return at(node).parent; }
    const Hash128& hash(NodeId node) const noexcept { return at(node).hash; }
    std::span<const std::int32_t> tokens(NodeId node) const noexcept;
    std::size_t size() const noexcept { return nodes_.size() - free_.size(); }
    std::size_t capacity() const noexcept { return nodes_.size(); }

    // For audits: links of a node, nothing where there is none; the first broken invariant.
    std::optional<std::int32_t> links(NodeId node) const noexcept;
    std::optional<const char*> broken() const;

  private:
    struct Node {
        Hash128 hash{};
        std::uint64_t salt = 0;
        std::optional<NodeId> parent;
        std::int32_t links = 0;
        std::int32_t children = 0;
        std::optional<NodeId> first_child, next_sibling, previous_sibling;
        bool used = false;
        bool listed = false;
        PerGroup<Copies> copies;
    };

    template <class T, class Both>
    static auto& pick(Both& copies) noexcept {
        if constexpr (std::is_same_v<T, Device>) {
            return copies.device;
        } else {
            return copies.host;
        }
    }
    Node& at(NodeId node) noexcept { return nodes_[static_cast<std::size_t>(node.value)]; }
    const Node& at(NodeId node) const noexcept {
        return nodes_[static_cast<std::size_t>(node.value)];
    }
    static bool held(const Node& node) noexcept;
    void leave_parent(NodeId node) noexcept;

    // An open-addressed table from hash to node: linear probing, at most half full.
    std::size_t home(const Hash128& hash) const noexcept { return hash.lo & (table_.size() - 1); }
    std::size_t after(std::size_t place) const noexcept {
        return (place + 1) & (table_.size() - 1);
    }
    void enlist(NodeId node) noexcept;
    void delist(NodeId node) noexcept;
    void unlist(NodeId node) noexcept;

    TokenCount page_size_;
    bool shared_;
    Sessions& sessions_;
    Openings openings_;
    std::vector<Node> nodes_;
    std::vector<std::int32_t> tokens_;  // by node, page_size each
    std::vector<std::optional<NodeId>> table_;
    std::vector<NodeId> free_;
};

}  // namespace tokenspeed::control
