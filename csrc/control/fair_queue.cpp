#include "fair_queue.h"

#include <algorithm>

#include "room.h"

namespace tokenspeed::control {

namespace {

// So many tenants without requests are remembered at least, lest they come back unburdened.
constexpr std::size_t kPausedMax = 256;

}  // namespace

LineId FairQueue::join(std::int32_t priority, TenantId tenant) {
    if (by_tenant_.size() > 2 * live_lines_ + kPausedMax) forget_paused();
    if (free_.empty()) {
        make_room_for(free_, lines_.size() + 1);  // so that a line can always be freed
        lines_.push_back({.priority = 0, .tenant = tenant});
        free_.push_back(LineId(static_cast<std::int32_t>(lines_.size() - 1)));
    }
    const auto [found, fresh] = by_tenant_.try_emplace({priority, tenant}, free_.back());
    Line& line = at(found->second);
    if (fresh) {
        free_.pop_back();
        line = {.priority = priority, .tenant = tenant};
    }
    if (line.live == 0) {
        // Now, not when it waits: by then those who are there may have left.
        no_lower_than_others(line);
        ++live_lines_;
    }
    ++line.live;
    return found->second;
}

void FairQueue::part(LineId id) noexcept {
    Line& line = at(id);
    if (--line.live > 0) return;
    --live_lines_;
    if (least_served(line.priority, nullptr)) return;
    // Nobody of this priority is left: whoever comes next, all start alike.
    for (auto found = by_tenant_.lower_bound({line.priority, TenantId(0)});
         found != by_tenant_.end() && found->first.first == line.priority;) {
        free_.push_back(found->second);
        found = by_tenant_.erase(found);
    }
}

void FairQueue::wait(LineId id, std::int64_t arrival, std::int64_t tokens) {
    Line& line = at(id);
    const bool pauses = line.arrivals.empty();
    line.arrivals.emplace(arrival, tokens);
    line.tokens += tokens;
    if (pauses) no_lower_than_others(line);
}

void FairQueue::leave(LineId id, std::int64_t arrival) noexcept {
    Line& line = at(id);
    const auto found = line.arrivals.find(arrival);
    if (found == line.arrivals.end()) return;
    line.tokens -= found->second;
    line.arrivals.erase(found);
}

std::optional<FairQueue::Turn> FairQueue::head() const noexcept {
    std::optional<Turn> first;
    for (const Line& line : lines_) {
        if (line.arrivals.empty()) continue;
        const Turn turn{line.priority, line.served, line.arrivals.begin()->first};
        if (!first || turn < *first) first = turn;
    }
    return first;
}

FairQueue::Backlog FairQueue::ahead(LineId id, std::int64_t tokens) const noexcept {
    const Line& own = at(id);
    Backlog backlog;
    for (const Line& line : lines_) {
        if (line.arrivals.empty() || line.priority > own.priority) continue;
        const auto waiting = static_cast<double>(line.tokens);
        double share = 1.0;
        if (line.priority == own.priority && &line != &own && line.tokens > 0) {
            const auto even = static_cast<double>(own.served + own.tokens + tokens - line.served);
            share = std::clamp(even / waiting, 0.0, 1.0);
        }
        backlog.requests += share * static_cast<double>(line.arrivals.size());
        backlog.tokens += share * waiting;
    }
    return backlog;
}

std::optional<std::int64_t> FairQueue::least_served(std::int32_t priority,
                                                    const Line* but) const noexcept {
    std::optional<std::int64_t> least;
    for (const Line& line : lines_) {
        if (line.live == 0 || line.priority != priority || &line == but) continue;
        if (!least || line.served < *least) least = line.served;
    }
    return least;
}

void FairQueue::no_lower_than_others(Line& line) noexcept {
    if (const auto least = least_served(line.priority, &line)) {
        line.served = std::max(line.served, *least);
    }
}

// Among so many tenants one that pauses has waited its turn by now.
void FairQueue::forget_paused() noexcept {
    std::erase_if(by_tenant_, [&](const auto& entry) {
        if (at(entry.second).live > 0) return false;
        free_.push_back(entry.second);
        return true;
    });
}

}  // namespace tokenspeed::control
