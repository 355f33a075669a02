// Sessions: whose content is whose in the tree of prompts, and whose is dropped first.
//
// No client names its session; they are inferred. A *branch* is the path of pages that one session
// grew. A prompt that goes on where an idle branch ends is that session's next turn. One that
// leaves a branch on its way begins a branch of its own and shares the pages before; if it keeps
// the session's first prompt but not its latest, it took the session over (a history compacted or
// edited, a parent that goes on without its sub-agent), and the rest of the old branch is what was
// left behind.
//
// A page belongs to the branch that used it last. Of what may be dropped goes first
//   1. what fell behind a window,
//   2. pages of absent sessions, by what holding them is worth (`ReturnTimes`): left behind or away
//      for too long, then those expected late, at last those expected soon; of equals the longest
//      absent, and one session whole before the next,
//   3. pages wanted by requests that wait or run, the latest request first.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <optional>
#include <vector>

#include "ghosts.h"
#include "hash.h"
#include "ids.h"
#include "return_times.h"
#include "rings.h"

namespace tokenspeed::control {

using BranchId = Id<struct BranchTag, std::int32_t>;
// One cache group on one tier: what it may drop is ordered apart from the others'.
using LaneId = Id<struct LaneTag, std::int32_t>;

// The numbers are core.config.CachePolicy's.
enum class CachePolicy : std::int32_t { kSession = 0, kLru = 1 };

// What a prompt finds when it comes in.
struct Opening {
    std::optional<NodeId> deepest;  // the last page of its content that is known
    bool inside;                    // whether others go on from there
    std::int32_t known;             // pages up to there
    std::optional<Hash128> next;    // the page behind, if the prompt fills one
    std::int32_t pages;             // that the prompt fills
};

// Owns no page. O(1) or O(lanes) each, `advance` and `coldest` O(classes); only `begin` may
// allocate. Time is an argument, and the same calls give the same order.
class Sessions {
  public:
    Sessions(std::size_t nodes_max, CachePolicy policy);
    Sessions(const Sessions&) = delete;
    Sessions& operator=(const Sessions&) = delete;

    // A lane more, before anything is entered; at most eight.
    LaneId add_lane();

    // --- requests ---

    // Whose turn it is. The branch is wanted until `end`.
    [[nodiscard]] BranchId begin(const Opening& opening, std::int64_t now_us);
    // The request gave all its pages back, after an answer of so many tokens.
    void end(BranchId branch, std::int64_t outputs, std::int64_t now_us) noexcept;

    // --- the tree ---

    void entered(NodeId node, std::optional<NodeId> parent, BranchId branch) noexcept;
    // The content is gone from every lane.
    void removed(NodeId node, const Hash128& hash) noexcept;
    // A request of the branch was the last to use the node.
    void used(NodeId node, BranchId branch) noexcept;
    BranchId branch(NodeId node) const noexcept { return at(node).branch; }

    // Whether the content of a page that is not there was there once, as far as is remembered.
    bool remembers(const Hash128& hash) const noexcept { return ghosts_.find(hash).has_value(); }

    // --- what to drop ---

    // Moves on the branches whose time away takes them on, some at a time.
    void advance(std::int64_t now_us) noexcept;
    // Whether a lane may drop its page of a node; `first` puts it before all others.
    void offer(LaneId lane, NodeId node, bool first = false) noexcept;
    void withhold(LaneId lane, NodeId node) noexcept;
    bool offered(LaneId lane, NodeId node) const noexcept {
        return (at(node).offered & bit(lane)) != 0;
    }
    std::optional<NodeId> coldest(LaneId lane) const noexcept;

    // Whether it matters how long sessions stay away.
    bool learns() const noexcept { return policy_ == CachePolicy::kSession; }

    // For fingerprints: appends whose the nodes are and in which order they would be dropped, with
    // branches named as they come; and what was learned of times away, where it decides that.
    void describe(const std::vector<NodeId>& nodes, const std::vector<BranchId>& wanted,
                  std::vector<std::int64_t>& words) const;

    // For audits: the first broken invariant, nothing if all hold.
    std::optional<const char*> broken() const;

  private:
    struct Node {
        BranchId branch{0};
        std::int32_t depth = 0;
        std::uint8_t offered = 0;  // a bit for each lane
        bool known = false;
    };
    struct Ghost {
        BranchId branch;
        std::int32_t generation;
    };
    enum class Life : std::uint8_t { kUnused, kWanted, kAway, kGone };  // gone: away, its pages too
    struct Branch {
        Life life = Life::kUnused;
        std::int32_t generation = 0;
        std::int32_t nodes = 0;
        std::int32_t requests = 0;
        std::int32_t first_pages = 0;   // of the session's first prompt
        std::int32_t prompt_pages = 0;  // of its latest
        std::int32_t wait_class = 0;
        std::int32_t bin = 0;
        std::int64_t outputs = 0;
        std::int64_t left_us = 0;  // when it was last heard of
        double pace = 0;
        std::optional<Ghost> origin = {};  // where it left another
    };
    // Branches by (class, bin), oldest in front; nonempty lists have a bit.
    struct Groups {
        Rings rings{static_cast<std::size_t>(kGroups)};
        std::array<std::uint64_t, ReturnTimes::kClasses> filled{};
    };
    struct Lane {
        Rings offers;  // nodes, the head of those that go first, then a head for each branch
        Groups groups;
    };
    static constexpr std::int32_t kWantedGroup = ReturnTimes::kClasses * ReturnTimes::kBins;
    static constexpr std::int32_t kGroups = kWantedGroup + 1;
    static_assert(ReturnTimes::kBins <= 64);

    static std::uint8_t bit(LaneId lane) noexcept {
        return static_cast<std::uint8_t>(1U << lane.value);
    }
    static Rings::Place place(NodeId node) noexcept {
        return static_cast<Rings::Place>(node.value);
    }
    static Rings::Place place(BranchId branch) noexcept {
        return static_cast<Rings::Place>(kGroups + branch.value);
    }
    Rings::Place firsts() const noexcept { return static_cast<Rings::Place>(nodes_.size()); }
    Rings::Place offers(BranchId branch) const noexcept {
        return static_cast<Rings::Place>(nodes_.size() + 1 +
                                         static_cast<std::size_t>(branch.value));
    }
    Node& at(NodeId node) noexcept { return nodes_[static_cast<std::size_t>(node.value)]; }
    const Node& at(NodeId node) const noexcept {
        return nodes_[static_cast<std::size_t>(node.value)];
    }
    Branch& at(BranchId branch) noexcept {
        return branches_[static_cast<std::size_t>(branch.value)];
    }
    const Branch& at(BranchId branch) const noexcept {
        return branches_[static_cast<std::size_t>(branch.value)];
    }
    template <class Visit>
    void each_lane(Visit&& visit) {
        for (std::size_t i = 0; i < lanes_.size(); ++i) {
            visit(lanes_[i], LaneId(static_cast<std::int32_t>(i)));
        }
    }

    std::optional<BranchId> continued(const Opening& opening) const noexcept;
    BranchId fork(const Opening& opening, std::int64_t now_us);
    BranchId fresh();
    void leave_behind(BranchId branch, std::int64_t now_us) noexcept;
    void set_away(BranchId branch, std::int64_t outputs, std::int64_t now_us) noexcept;
    void refresh(const Ghost& origin, std::int64_t outputs, std::int64_t now_us) noexcept;
    void settle(BranchId branch) noexcept;
    void retire(BranchId branch) noexcept;
    void disown(NodeId node) noexcept;

    static std::int32_t group(const Branch& branch) noexcept;
    void join(Groups& groups, std::int32_t group, BranchId branch) const noexcept;
    static void part(Groups& groups, std::int32_t group, BranchId branch) noexcept;
    // Takes a branch out of its group everywhere, lets `change` change it, and puts it in its new
    // one.
    template <class Change>
    void regroup(BranchId branch, Change&& change) noexcept;
    void grow_away(BranchId branch, std::int64_t now_us) noexcept;

    CachePolicy policy_;
    ReturnTimes times_;
    std::vector<Node> nodes_;
    std::vector<Branch> branches_;
    std::vector<Lane> lanes_;
    Groups all_;   // every branch in use
    Rings spare_;  // the head of the unused, the head of the gone, oldest in front, then branches
    std::int32_t gone_ = 0;
    Ghosts<Ghost> ghosts_;
    std::int64_t next_advance_us_ = 0;
};

}  // namespace tokenspeed::control
