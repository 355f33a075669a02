#include "content_tree.h"

#include <algorithm>
#include <bit>
#include <cassert>

namespace tokenspeed::control {

ContentTree::ContentTree(std::size_t nodes_max, TokenCount page_size, bool shared,
                         Sessions& sessions)
    : page_size_(page_size), shared_(shared), sessions_(sessions), nodes_(nodes_max) {
    free_.reserve(nodes_max);
    for (std::size_t i = nodes_max; i > 0; --i) {
        free_.push_back(NodeId(static_cast<std::int32_t>(i - 1)));
    }
    if (shared) {
        tokens_.resize(nodes_max * static_cast<std::size_t>(page_size.value));
        table_.resize(std::bit_ceil(2 * nodes_max));
    }
}

std::span<const std::int32_t> ContentTree::tokens(NodeId node) const noexcept {
    const auto size = static_cast<std::size_t>(page_size_.value);
    return std::span(tokens_).subspan(static_cast<std::size_t>(node.value) * size, size);
}

std::optional<NodeId> ContentTree::find(const PageContent& content,
                                        std::optional<NodeId> parent) const noexcept {
    if (!shared_) return std::nullopt;
    for (std::size_t place = home(content.hash); table_[place]; place = after(place)) {
        const NodeId id = *table_[place];
        const Node& node = at(id);
        if (node.hash == content.hash && node.parent == parent && node.salt == content.salt &&
            std::ranges::equal(content.tokens, tokens(id))) {
            return id;
        }
    }
    return std::nullopt;
}

std::optional<NodeId> ContentTree::find(const Hash128& hash) const noexcept {
    if (!shared_) return std::nullopt;
    for (std::size_t place = home(hash); table_[place]; place = after(place)) {
        if (at(*table_[place]).hash == hash) return table_[place];
    }
    return std::nullopt;
}

NodeRef ContentTree::link(NodeId node) noexcept {
    ++at(node).links;
    return NodeRef(node);
}

NodeId ContentTree::unlink(NodeRef&& ref) noexcept {
    const NodeId node = ref.melt();
    --at(node).links;
    return node;
}

NodeRef ContentTree::enter(const PageContent& content, std::optional<NodeId> parent,
                           BranchId branch) noexcept {
    if (const auto known = find(content, parent)) return link(*known);
    assert(!full() && "the content tree is full");
    const NodeId id = free_.back();
    free_.pop_back();
    Node& node = at(id);
    node.used = true;
    node.parent = parent;
    if (parent) {
        Node& before = at(*parent);
        ++before.children;
        node.next_sibling = before.first_child;
        if (before.first_child) at(*before.first_child).previous_sibling = id;
        before.first_child = id;
    }
    if (shared_) {
        node.hash = content.hash;
        node.salt = content.salt;
        std::ranges::copy(content.tokens, tokens_.begin() + (tokens(id).data() - tokens_.data()));
        enlist(id);
        sessions_.entered(id, parent, branch);
        if (!parent) openings_.add(content.tokens);
    }
    return link(id);
}

bool ContentTree::held(const Node& node) noexcept {
    bool held = node.links > 0 || node.children > 0;
    each_group([&]<class G>() {
        const Copies<G>& copies = node.copies.of<G>();
        held = held || copies.device.page || copies.host.page;
    });
    return held;
}

void ContentTree::prune(NodeId id) noexcept {
    for (std::optional<NodeId> next = id; next && !held(at(*next));) {
        Node& node = at(*next);
        unlist(*next);
        const NodeId gone = *next;
        next = node.parent;
        leave_parent(gone);
        node = Node{};
        free_.push_back(gone);
    }
}

void ContentTree::leave_parent(NodeId id) noexcept {
    Node& node = at(id);
    if (!node.parent) return;
    Node& before = at(*node.parent);
    --before.children;
    if (node.previous_sibling) {
        at(*node.previous_sibling).next_sibling = node.next_sibling;
    } else {
        before.first_child = node.next_sibling;
    }
    if (node.next_sibling) at(*node.next_sibling).previous_sibling = node.previous_sibling;
    node.next_sibling.reset();
    node.previous_sibling.reset();
    each_group([&]<class G>() {
        Copies<G>& ours = node.copies.of<G>();
        Copies<G>& theirs = before.copies.of<G>();
        if (ours.device.page) --theirs.device.children;
        if (ours.host.page) --theirs.host.children;
    });
    node.parent.reset();
}

void ContentTree::detach(NodeId id) noexcept {
    unlist(id);
    leave_parent(id);
}

// Nobody finds it any more.
void ContentTree::unlist(NodeId id) noexcept {
    if (!at(id).listed) return;
    delist(id);
    if (!at(id).parent) openings_.remove(tokens(id));
    sessions_.removed(id, at(id).hash);
}

NodeId ContentTree::leaf_below(NodeId node) const noexcept {
    while (at(node).first_child) node = *at(node).first_child;
    return node;
}

void ContentTree::enlist(NodeId node) noexcept {
    std::size_t place = home(at(node).hash);
    while (table_[place]) place = after(place);
    table_[place] = node;
    at(node).listed = true;
}

void ContentTree::delist(NodeId node) noexcept {
    std::size_t hole = home(at(node).hash);
    while (table_[hole] != node) hole = after(hole);
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
    at(node).listed = false;
}

// --- audits -----------------------------------------------------------------------------------

std::optional<std::int32_t> ContentTree::links(NodeId node) const noexcept {
    if (!at(node).used) return std::nullopt;
    return at(node).links;
}

std::optional<const char*> ContentTree::broken() const {
    std::vector<Node> counted(nodes_.size());
    std::size_t used = 0, listed = 0, found = 0;
    for (const Node& node : nodes_) {
        if (!node.used) continue;
        ++used;
        listed += node.listed ? 1 : 0;
        if (!held(node)) return "a node stayed that nothing keeps";
        if (node.listed && !shared_) return "a node is listed though sharing is off";
        if (node.listed && !find(node.hash)) return "a node is listed, but not found";
        if (!node.parent) continue;
        if (!at(*node.parent).used) return "a node lost its parent";
        Node& parent = counted[static_cast<std::size_t>(node.parent->value)];
        ++parent.children;
        each_group([&]<class G>() {
            const Copies<G>& copies = node.copies.of<G>();
            parent.copies.of<G>().device.children += copies.device.page ? 1 : 0;
            parent.copies.of<G>().host.children += copies.host.page ? 1 : 0;
        });
    }
    if (used != size()) return "nodes are miscounted";
    for (const auto& entry : table_) {
        if (entry) found += at(*entry).listed ? 1 : 0;
    }
    if (found != listed) return "the table and the nodes disagree";
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
        bool equal = nodes_[i].children == counted[i].children;
        each_group([&]<class G>() {
            const Copies<G>& have = nodes_[i].copies.of<G>();
            const Copies<G>& want = counted[i].copies.of<G>();
            equal = equal && have.device.children == want.device.children &&
                    have.host.children == want.host.children;
        });
        if (!equal) return "children are miscounted";
    }
    return std::nullopt;
}

}  // namespace tokenspeed::control
