// Tickets: how a waiting request gets its pages, and what it begins with.
#pragma once

#include <variant>
#include <vector>

#include "states.h"

namespace tokenspeed::control {

// What a ticket promises: cached content, pages in place, pages to come.
struct Grant {
    Trail trail;
    PerGroup<Resting> pages;
    TokenCount cached;  // tokens that need not be computed
};

// The tickets. What one promises is in it, so what it says cannot go stale.

// To begin at once.
class [[nodiscard]] Admission {
  public:
    Admission(Admission&&) noexcept = default;
    Admission& operator=(Admission&&) = delete;

  private:
    friend class Prober;
    friend Prefilling admit(Queued&& queued, Admission&& ticket, Slot&& slot) noexcept;
    friend void cancel(Admission&& ticket, Store& store) noexcept;
    explicit Admission(Grant&& grant) noexcept : grant_(std::move(grant)) {}
    Grant grant_;
};

// To begin once pages that only the host holds are loaded.
class [[nodiscard]] LoadAdmission {
  public:
    LoadAdmission(LoadAdmission&&) noexcept = default;
    LoadAdmission& operator=(LoadAdmission&&) = delete;

  private:
    friend class Prober;
    friend Loading load(Queued&& queued, LoadAdmission&& ticket, Slot&& slot,
                        TransferId transfer) noexcept;
    friend void cancel(LoadAdmission&& ticket, Store& store) noexcept;
    template <class G>
    struct Found {
        std::int32_t index;
        PageRef<G, Host> source;
        FreePage<G> target;
    };
    template <class G>
    using Hosted = std::vector<Found<G>>;
    LoadAdmission(Grant&& grant, PerGroup<Hosted>&& hosted, PerGroup<Loads>&& room) noexcept
        : grant_(std::move(grant)), hosted_(std::move(hosted)), room_(std::move(room)) {}
    Grant grant_;
    PerGroup<Hosted> hosted_;
    PerGroup<Loads> room_;
};

// To begin once another engine has sent what it computed.
class [[nodiscard]] ReceiveAdmission {
  public:
    ReceiveAdmission(ReceiveAdmission&&) noexcept = default;
    ReceiveAdmission& operator=(ReceiveAdmission&&) = delete;

  private:
    friend class Prober;
    friend Receiving receive(Queued&& queued, ReceiveAdmission&& ticket, Slot&& slot,
                             TransferId transfer) noexcept;
    friend void cancel(ReceiveAdmission&& ticket, Store& store) noexcept;
    ReceiveAdmission(Grant&& grant, PerGroup<Arrivals>&& room) noexcept
        : grant_(std::move(grant)), room_(std::move(room)) {}
    Grant grant_;
    PerGroup<Arrivals> room_;
};

// Refused: what each group's cached and missing part need, if they were all unreferenced.
struct Refused {
    PageCounts wanted;
};
using Probed = std::variant<Admission, LoadAdmission, ReceiveAdmission, Refused>;
// Probes the cache for the request and takes what it needs, leaving `reserve` pages to others.
// `chunk_max` tokens are the most that a step feeds: so far ahead a window group is promised pages.
Probed probe(const Queued& queued, PageCount reserve, TokenCount chunk_max, Store& store);

// Gives everything back.
void cancel(Admission&& ticket, Store& store) noexcept;
void cancel(LoadAdmission&& ticket, Store& store) noexcept;
void cancel(ReceiveAdmission&& ticket, Store& store) noexcept;

Prefilling admit(Queued&& queued, Admission&& ticket, Slot&& slot) noexcept;
[[nodiscard]] Loading load(Queued&& queued, LoadAdmission&& ticket, Slot&& slot,
                           TransferId transfer) noexcept;
[[nodiscard]] Receiving receive(Queued&& queued, ReceiveAdmission&& ticket, Slot&& slot,
                                TransferId transfer) noexcept;

}  // namespace tokenspeed::control
