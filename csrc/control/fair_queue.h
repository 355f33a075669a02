// Who waits, and whose turn it is: priority first, then the tenant served least, then arrival.
//
// What a tenant was given within a priority is counted in tokens, prompt tokens computed and tokens
// sampled alike (the virtual token counter of Sheng et al., "Fairness in Serving Large Language
// Models", OSDI 2024). Whoever comes, or waits again after a pause, starts no lower than the least
// served of those who are there: a pause saves up no turns. Within a line, which is one tenant at
// one priority, the order is arrival order, and with a single tenant there is no other.
//
// Holds places, not requests. Nothing here depends on the ids of requests, nor on the numbers of
// tenants beyond which of them are equal.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "ids.h"

namespace tokenspeed::control {

using TenantId = Id<struct TenantTag, std::uint64_t>;
using LineId = Id<struct LineTag, std::int32_t>;

class FairQueue {
  public:
    // A request of the tenant lives from now on, until it parts.
    [[nodiscard]] LineId join(std::int32_t priority, TenantId tenant);
    void part(LineId line) noexcept;

    // It waits for its turn, with so many tokens of its prompt to compute.
    void wait(LineId line, std::int64_t arrival, std::int64_t tokens);
    // Waits no more; no effect on one that does not wait.
    void leave(LineId line, std::int64_t arrival) noexcept;

    void charge(LineId line, std::int64_t tokens) noexcept { at(line).served += tokens; }

    // A place in the order of turns.
    struct Turn {
        std::int32_t priority;
        std::int64_t served;
        std::int64_t arrival;
        friend auto operator<=>(const Turn&, const Turn&) = default;
    };
    Turn turn(LineId line, std::int64_t arrival) const noexcept {
        return {at(line).priority, at(line).served, arrival};
    }
    // The first of those who wait. O(lines).
    std::optional<Turn> head() const noexcept;

    // For fingerprints: shows every line's priority, tenant, live requests and what it was given.
    template <class Visit>
    void each_line(Visit&& visit) const {
        for (const auto& [key, id] : by_tenant_) {
            visit(key.first, key.second, at(id).live, at(id).served);
        }
    }

    // What waits and will have its turn before a newcomer to a line.
    struct Backlog {
        double requests = 0;
        double tokens = 0;
    };
    // More urgent lines, its own, and of the other tenants as much as evens out what each was given
    // once the newcomer's `tokens` are done. O(lines).
    Backlog ahead(LineId line, std::int64_t tokens) const noexcept;

  private:
    struct Line {
        std::int32_t priority;
        TenantId tenant;
        std::int64_t served = 0;
        std::int32_t live = 0;
        std::map<std::int64_t, std::int64_t> arrivals{};  // of those who wait, and their tokens
        std::int64_t tokens = 0;
    };
    Line& at(LineId line) noexcept { return lines_[static_cast<std::size_t>(line.value)]; }
    const Line& at(LineId line) const noexcept {
        return lines_[static_cast<std::size_t>(line.value)];
    }
    // What the least served line of a priority got, among those with live requests but one.
    std::optional<std::int64_t> least_served(std::int32_t priority, const Line* but) const noexcept;
    void no_lower_than_others(Line& line) noexcept;
    void forget_paused() noexcept;

    std::vector<Line> lines_;  // those not in `by_tenant_` are free
    std::vector<LineId> free_;
    std::map<std::pair<std::int32_t, TenantId>, LineId> by_tenant_;
    std::size_t live_lines_ = 0;
};

}  // namespace tokenspeed::control
