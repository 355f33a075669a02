#include "sessions.h"

#include <algorithm>
#include <cassert>
#include <limits>
#include <utility>

namespace tokenspeed::control {

namespace {

// Sessions whose pages are all gone and who may still come back, so that how long they were away is
// learned from them too.
constexpr std::int32_t kGoneMax = 4096;
// As many branches move on in one call at most, for a bounded time; the rest wait for the next.
constexpr std::int32_t kMovesMax = 256;
// As many removed pages are remembered as there are nodes, within these bounds.
constexpr std::size_t kGhostsMin = 4096, kGhostsMax = std::size_t{1} << 20;

// Places in `spare_`.
constexpr Rings::Place kUnusedHead = 0, kGoneHead = 1, kSpareHeads = 2;
Rings::Place spare_place(BranchId branch) {
    return kSpareHeads + static_cast<Rings::Place>(branch.value);
}
BranchId spare_branch(Rings::Place place) {
    return BranchId(static_cast<std::int32_t>(place - kSpareHeads));
}

// What is believed before anything was learned: worked out once, for it takes a quarter of a
// millisecond.
const ReturnTimes& prior_times() {
    static const ReturnTimes prior;
    return prior;
}

}  // namespace

Sessions::Sessions(std::size_t nodes_max, CachePolicy policy)
    : policy_(policy),
      times_(prior_times()),
      nodes_(nodes_max),
      spare_(kSpareHeads),
      ghosts_(std::clamp(nodes_max, kGhostsMin, kGhostsMax)) {}

LaneId Sessions::add_lane() {
    assert(lanes_.size() < 8 && branches_.empty() && "a node has eight bits for lanes");
    lanes_.emplace_back().offers.grow(nodes_.size() + 1);
    return LaneId(static_cast<std::int32_t>(lanes_.size()) - 1);
}

// --- requests -----------------------------------------------------------------------------------

BranchId Sessions::begin(const Opening& opening, std::int64_t now_us) {
    if (const auto known = continued(opening)) {
        const Branch& branch = at(*known);
        if (branch.life == Life::kGone) {
            spare_.remove(spare_place(*known));
            --gone_;
        }
        grow_away(*known, now_us);
        if (policy_ == CachePolicy::kSession) {
            times_.returned(branch.wait_class, branch.bin);
            if (branch.wait_class != ReturnTimes::kLeft) {
                at(*known).pace =
                    times_.learn(branch.outputs, branch.pace, now_us - branch.left_us);
            }
        }
        regroup(*known, [&](Branch& changed) {
            changed.life = Life::kWanted;
            changed.requests = 1;
            changed.prompt_pages = opening.pages;
        });
        return *known;
    }
    return fork(opening, now_us);
}

// The session that comes back, if it does: where its branch ends, or ended before it was cut.
std::optional<BranchId> Sessions::continued(const Opening& opening) const noexcept {
    const auto away = [&](BranchId branch) {
        return at(branch).life == Life::kAway || at(branch).life == Life::kGone;
    };
    if (opening.next) {
        const auto ghost = ghosts_.find(*opening.next);
        if (ghost && at(ghost->branch).generation == ghost->generation && away(ghost->branch)) {
            return ghost->branch;
        }
    }
    if (!opening.deepest || opening.inside) return std::nullopt;
    const BranchId owner = at(*opening.deepest).branch;
    if (!away(owner)) return std::nullopt;
    return owner;
}

BranchId Sessions::fork(const Opening& opening, std::int64_t now_us) {
    const BranchId made = fresh();
    Branch& branch = at(made);
    branch.first_pages = opening.pages;
    if (opening.deepest) {
        const BranchId origin = at(*opening.deepest).branch;
        const Branch& from = at(origin);
        branch.origin = Ghost{origin, from.generation};
        if (opening.known >= from.first_pages) {
            // The same session goes on, or a part of it.
            branch.first_pages = from.first_pages;
            branch.pace = from.pace;
            if (opening.known < from.prompt_pages && from.life == Life::kAway) {
                leave_behind(origin, now_us);
            }
        }
    }
    branch.prompt_pages = opening.pages;
    branch.requests = 1;
    branch.left_us = now_us;
    branch.life = Life::kWanted;
    join(all_, group(branch), made);
    return made;
}

// A branch not in use: one never used or used up, else the longest gone if there are many, else
// new.
BranchId Sessions::fresh() {
    Rings::Place place = spare_.next(kUnusedHead);
    if (place == kUnusedHead && gone_ >= kGoneMax) {
        place = spare_.next(kGoneHead);
        const BranchId oldest = spare_branch(place);
        part(all_, group(at(oldest)), oldest);
        --gone_;
    }
    if (place != kUnusedHead) {
        const BranchId reused = spare_branch(place);
        spare_.remove(place);
        at(reused) = Branch{.generation = at(reused).generation + 1};
        return reused;
    }
    const BranchId added(static_cast<std::int32_t>(branches_.size()));
    // If this throws half-way, rings are too long, which does no harm.
    spare_.grow(1);
    all_.rings.grow(1);
    each_lane([](Lane& lane, LaneId) {
        lane.offers.grow(1);
        lane.groups.rings.grow(1);
    });
    branches_.emplace_back();
    return added;
}

void Sessions::leave_behind(BranchId branch, std::int64_t now_us) noexcept {
    if (policy_ == CachePolicy::kLru) return;
    times_.watched(ReturnTimes::kLeft, 0);
    regroup(branch, [&](Branch& left) {
        left.wait_class = ReturnTimes::kLeft;
        left.bin = 0;
        left.left_us = now_us;
    });
    next_advance_us_ = std::min(next_advance_us_, now_us + ReturnTimes::bin_end_us(0));
}

void Sessions::end(BranchId branch, std::int64_t outputs, std::int64_t now_us) noexcept {
    if (--at(branch).requests > 0) return;
    set_away(branch, outputs, now_us);
    if (at(branch).nodes > 0) return;
    if (const auto origin = at(branch).origin) refresh(*origin, outputs, now_us);
    retire(branch);
}

void Sessions::set_away(BranchId branch, std::int64_t outputs, std::int64_t now_us) noexcept {
    regroup(branch, [&](Branch& ended) {
        ended.life = Life::kAway;
        ended.outputs = outputs;
        ended.left_us = now_us;
        ended.bin = 0;
        ended.wait_class =
            policy_ == CachePolicy::kLru ? 0 : times_.wait_class(outputs, ended.pace);
    });
    times_.watched(at(branch).wait_class, 0);
    next_advance_us_ = std::min(next_advance_us_, now_us + ReturnTimes::bin_end_us(0));
}

// A request that added no page used those of the branch it came from.
void Sessions::refresh(const Ghost& origin, std::int64_t outputs, std::int64_t now_us) noexcept {
    const Branch& branch = at(origin.branch);
    if (branch.generation != origin.generation || branch.life != Life::kAway) return;
    set_away(origin.branch, outputs, now_us);
}

// A branch without a page is of use only until its session comes back, if it is to come back.
void Sessions::settle(BranchId branch) noexcept {
    if (at(branch).nodes > 0 || at(branch).life != Life::kAway) return;
    if (policy_ == CachePolicy::kLru) return retire(branch);
    at(branch).life = Life::kGone;
    spare_.insert_before(kGoneHead, spare_place(branch));
    ++gone_;
}

void Sessions::retire(BranchId branch) noexcept {
    part(all_, group(at(branch)), branch);
    at(branch).life = Life::kUnused;
    spare_.insert_before(kUnusedHead, spare_place(branch));
}

// --- the tree -----------------------------------------------------------------------------------

void Sessions::entered(NodeId node, std::optional<NodeId> parent, BranchId branch) noexcept {
    at(node) = Node{.branch = branch, .known = true};
    if (parent) at(node).depth = at(*parent).depth + 1;
    ++at(branch).nodes;
}

void Sessions::removed(NodeId node, const Hash128& hash) noexcept {
    const BranchId branch = at(node).branch;
    ghosts_.add(hash, {branch, at(branch).generation});
    disown(node);
    at(node) = Node{};
}

void Sessions::disown(NodeId node) noexcept {
    const BranchId branch = at(node).branch;
    --at(branch).nodes;
    settle(branch);
}

void Sessions::used(NodeId node, BranchId branch) noexcept {
    if (at(node).branch == branch) return;
    const std::uint8_t offered = at(node).offered;
    each_lane([&](Lane&, LaneId lane) {
        if (offered & bit(lane)) withhold(lane, node);
    });
    disown(node);
    at(node).branch = branch;
    ++at(branch).nodes;
    each_lane([&](Lane&, LaneId lane) {
        if (offered & bit(lane)) offer(lane, node);
    });
}

// --- groups -------------------------------------------------------------------------------------

std::int32_t Sessions::group(const Branch& branch) noexcept {
    if (branch.life == Life::kWanted) return kWantedGroup;
    return branch.wait_class * ReturnTimes::kBins + branch.bin;
}

// One that comes back to a list, after a page of it was dropped, is as old as it was: in front.
void Sessions::join(Groups& groups, std::int32_t group, BranchId branch) const noexcept {
    Rings::Place before = static_cast<Rings::Place>(group);
    if (const Rings::Place front = groups.rings.next(before); front != before) {
        const BranchId oldest(static_cast<std::int32_t>(front) - kGroups);
        if (at(branch).left_us < at(oldest).left_us) before = front;
    }
    groups.rings.insert_before(before, place(branch));
    if (group == kWantedGroup) return;
    groups.filled[static_cast<std::size_t>(group / ReturnTimes::kBins)] |=
        std::uint64_t{1} << (group % ReturnTimes::kBins);
}

void Sessions::part(Groups& groups, std::int32_t group, BranchId branch) noexcept {
    groups.rings.remove(place(branch));
    if (group == kWantedGroup || !groups.rings.alone(static_cast<Rings::Place>(group))) return;
    groups.filled[static_cast<std::size_t>(group / ReturnTimes::kBins)] &=
        ~(std::uint64_t{1} << (group % ReturnTimes::kBins));
}

template <class Change>
void Sessions::regroup(BranchId branch, Change&& change) noexcept {
    const std::int32_t before = group(at(branch));
    change(at(branch));
    const std::int32_t after = group(at(branch));
    part(all_, before, branch);
    join(all_, after, branch);
    for (Lane& lane : lanes_) {
        if (lane.offers.alone(offers(branch))) continue;
        part(lane.groups, before, branch);
        join(lane.groups, after, branch);
    }
}

// Brings an absent branch to the bin of its time away, and counts it in each on the way.
void Sessions::grow_away(BranchId branch, std::int64_t now_us) noexcept {
    if (policy_ == CachePolicy::kLru) return;
    const std::int32_t bin = ReturnTimes::bin(now_us - at(branch).left_us);
    if (bin <= at(branch).bin) return;
    regroup(branch, [&](Branch& away) {
        while (away.bin < bin) times_.watched(away.wait_class, ++away.bin);
    });
}

void Sessions::advance(std::int64_t now_us) noexcept {
    if (policy_ == CachePolicy::kLru || now_us < next_advance_us_) return;
    std::int64_t next_us = std::numeric_limits<std::int64_t>::max();
    std::int32_t moves = 0;
    for (std::int32_t c = 0; c < ReturnTimes::kClasses; ++c) {
        // From the last bin down, so that none moves twice; nobody leaves the last one.
        std::uint64_t filled = all_.filled[static_cast<std::size_t>(c)];
        filled &= (std::uint64_t{1} << (ReturnTimes::kBins - 1)) - 1;
        while (filled != 0) {
            const std::int32_t bin = 63 - std::countl_zero(filled);
            filled &= ~(std::uint64_t{1} << bin);
            const auto head = static_cast<Rings::Place>(c * ReturnTimes::kBins + bin);
            while (!all_.rings.alone(head)) {
                const BranchId oldest(static_cast<std::int32_t>(all_.rings.next(head)) - kGroups);
                const std::int64_t due_us = at(oldest).left_us + ReturnTimes::bin_end_us(bin);
                if (due_us > now_us) {
                    next_us = std::min(next_us, due_us);
                    break;
                }
                if (++moves > kMovesMax) return;
                grow_away(oldest, now_us);
                // Rounding must not hold it back at the very edge.
                if (at(oldest).bin == bin) {
                    regroup(oldest, [&](Branch& away) { ++away.bin; });
                    times_.watched(c, bin + 1);
                }
            }
        }
    }
    next_advance_us_ = next_us;
}

// --- what to drop -------------------------------------------------------------------------------

void Sessions::offer(LaneId lane, NodeId node, bool first) noexcept {
    if (offered(lane, node)) return;
    at(node).offered |= bit(lane);
    Lane& to = lanes_[static_cast<std::size_t>(lane.value)];
    if (first) {
        to.offers.insert_before(firsts(), place(node));
        return;
    }
    const BranchId branch = at(node).branch;
    const Rings::Place head = offers(branch);
    if (to.offers.alone(head)) {
        join(to.groups, group(at(branch)), branch);
        to.offers.insert_before(head, place(node));
        return;
    }
    // A branch is dropped from its front: the shallower page first, as the deeper may serve more.
    // Of a group that keeps whole prefixes only its last page is ever offered.
    const NodeId front(static_cast<std::int32_t>(to.offers.next(head)));
    to.offers.insert_before(at(node).depth < at(front).depth ? place(front) : head, place(node));
}

void Sessions::withhold(LaneId lane, NodeId node) noexcept {
    if (!offered(lane, node)) return;
    at(node).offered &= static_cast<std::uint8_t>(~bit(lane));
    Lane& from = lanes_[static_cast<std::size_t>(lane.value)];
    const BranchId branch = at(node).branch;
    const bool had = !from.offers.alone(offers(branch));
    from.offers.remove(place(node));
    if (had && from.offers.alone(offers(branch))) part(from.groups, group(at(branch)), branch);
}

std::optional<NodeId> Sessions::coldest(LaneId lane) const noexcept {
    const Lane& in = lanes_[static_cast<std::size_t>(lane.value)];
    const auto node = [](Rings::Place place) { return NodeId(static_cast<std::int32_t>(place)); };
    const auto branch = [](Rings::Place place) {
        return BranchId(static_cast<std::int32_t>(place) - kGroups);
    };
    if (!in.offers.alone(firsts())) return node(in.offers.next(firsts()));

    std::optional<BranchId> found;
    double least = std::numeric_limits<double>::infinity();
    for (std::int32_t c = 0; c < ReturnTimes::kClasses; ++c) {
        for (std::uint64_t filled = in.groups.filled[static_cast<std::size_t>(c)]; filled != 0;
             filled &= filled - 1) {
            const std::int32_t bin = std::countr_zero(filled);
            const double worth = times_.worth(c, bin);
            const auto head = static_cast<Rings::Place>(c * ReturnTimes::kBins + bin);
            const BranchId oldest = branch(in.groups.rings.next(head));
            if (worth < least ||
                (found && worth == least && at(oldest).left_us < at(*found).left_us)) {
                least = worth;
                found = oldest;
            }
        }
    }
    if (!found && !in.groups.rings.alone(kWantedGroup)) {
        found = branch(in.groups.rings.previous(kWantedGroup));
    }
    if (!found) return std::nullopt;
    return node(in.offers.next(offers(*found)));
}

// --- fingerprints -------------------------------------------------------------------------------

void Sessions::describe(const std::vector<NodeId>& nodes, const std::vector<BranchId>& wanted,
                        std::vector<std::int64_t>& words) const {
    std::vector<std::int64_t> node_names(nodes_.size(), -1), branch_names(branches_.size(), -1);
    std::int64_t branches = 0;
    for (std::size_t i = 0; i < nodes.size(); ++i) {
        node_names[static_cast<std::size_t>(nodes[i].value)] = static_cast<std::int64_t>(i);
    }
    // A branch by its own name, or by nothing where it is another by now.
    const auto current = [&](const Ghost& ghost) {
        const Branch& branch = at(ghost.branch);
        return branch.life != Life::kUnused && branch.generation == ghost.generation;
    };
    const auto tell = [&](auto&& self, BranchId id) -> void {
        std::int64_t& name = branch_names[static_cast<std::size_t>(id.value)];
        const bool first = name < 0;
        if (first) name = branches++;
        words.push_back(name);
        if (!first) return;
        const Branch& branch = at(id);
        for (const std::int64_t word :
             {static_cast<std::int64_t>(branch.life), std::int64_t{branch.requests},
              std::int64_t{group(branch)}, branch.left_us}) {
            words.push_back(word);
        }
        if (branch.origin && current(*branch.origin)) {
            self(self, branch.origin->branch);
        } else {
            words.push_back(-1);
        }
        if (!learns()) return;
        for (const std::int64_t word :
             {std::int64_t{branch.first_pages}, std::int64_t{branch.prompt_pages}, branch.outputs,
              std::bit_cast<std::int64_t>(branch.pace)}) {
            words.push_back(word);
        }
    };
    const auto each = [](const Rings& rings, Rings::Place head, auto&& visit) {
        for (auto place = rings.next(head); place != head; place = rings.next(place)) visit(place);
    };
    const auto tell_groups = [&](const Groups& groups, auto&& visit) {
        const auto tell_group = [&](std::int32_t group) {
            words.push_back(group);
            each(groups.rings, static_cast<Rings::Place>(group), [&](Rings::Place place) {
                const BranchId branch(static_cast<std::int32_t>(place) - kGroups);
                tell(tell, branch);
                visit(branch);
            });
        };
        tell_group(kWantedGroup);
        for (std::int32_t c = 0; c < ReturnTimes::kClasses; ++c) {
            std::uint64_t filled = groups.filled[static_cast<std::size_t>(c)];
            for (; filled != 0; filled &= filled - 1) {
                tell_group(c * ReturnTimes::kBins + std::countr_zero(filled));
            }
        }
    };
    for (const BranchId branch : wanted) tell(tell, branch);
    for (const NodeId node : nodes) tell(tell, at(node).branch);
    for (const Lane& lane : lanes_) {
        const auto tell_offers = [&](Rings::Place head) {
            words.push_back(-1);
            each(lane.offers, head, [&](Rings::Place node) {
                words.push_back(node_names[static_cast<std::size_t>(node)]);
            });
        };
        tell_offers(firsts());
        tell_groups(lane.groups, [&](BranchId branch) { tell_offers(offers(branch)); });
    }
    if (learns()) {
        tell_groups(all_, [](BranchId) {});
        each(spare_, kGoneHead, [&](Rings::Place place) { tell(tell, spare_branch(place)); });
        times_.describe(words);
    }
    std::vector<std::pair<std::uint64_t, BranchId>> ghosts;
    ghosts_.each([&](std::uint64_t hash, const Ghost& ghost) {
        if (current(ghost)) ghosts.emplace_back(hash, ghost.branch);
    });
    std::ranges::sort(ghosts);
    for (const auto& [hash, branch] : ghosts) {
        words.push_back(static_cast<std::int64_t>(hash));
        tell(tell, branch);
    }
}

// --- audits -------------------------------------------------------------------------------------

std::optional<const char*> Sessions::broken() const {
    std::vector<std::int32_t> nodes(branches_.size());
    for (const Node& node : nodes_) {
        if (node.known) ++nodes[static_cast<std::size_t>(node.branch.value)];
    }
    std::int32_t gone = 0;
    for (std::size_t i = 0; i < branches_.size(); ++i) {
        const Branch& branch = branches_[i];
        const BranchId id(static_cast<std::int32_t>(i));
        if (branch.nodes != nodes[i]) return "a branch miscounts its pages";
        if (branch.life == Life::kUnused && branch.nodes > 0) return "an unused branch has pages";
        if (branch.life == Life::kGone && branch.nodes > 0)
            return "a branch that is gone has pages";
        if ((branch.life == Life::kWanted) != (branch.requests > 0)) {
            return "a branch is wanted by nobody";
        }
        if (all_.rings.alone(place(id)) != (branch.life == Life::kUnused)) {
            return "a branch is not in its group";
        }
        gone += branch.life == Life::kGone;
        for (const Lane& lane : lanes_) {
            if (lane.offers.alone(offers(id)) != lane.groups.rings.alone(place(id))) {
                return "a branch with a page to drop is in no group";
            }
        }
    }
    if (gone != gone_) return "branches that are gone are miscounted";
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
        const NodeId node(static_cast<std::int32_t>(i));
        for (std::size_t l = 0; l < lanes_.size(); ++l) {
            const LaneId lane(static_cast<std::int32_t>(l));
            if (lanes_[l].offers.alone(place(node)) == offered(lane, node)) {
                return "a page is offered in no list";
            }
        }
    }
    return std::nullopt;
}

}  // namespace tokenspeed::control
