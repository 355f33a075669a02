#include "admission.h"

#include <algorithm>

#include "holdings.h"

namespace tokenspeed::control {

// Makes a ticket: finds what is cached, takes what is missing.
class Prober {
  public:
    Prober(const Request& request, TokenCount chunk_max, Store& store)
        : request_(request), chunk_max_(chunk_max), index_(store.index), store_(store) {}

    Probed run(PageCount reserve) {
        PageCounts before;
        each_group([&]<class G>() { before.of<G>() = index_.available<G>(); });
        find();
        PageCounts wanted;
        bool fits = true;
        each_group([&]<class G>() {
            if (!index_.has<G>()) return;
            const PageCount spare = kPaged<G> ? reserve : PageCount(0);
            fits = fits && needs_.of<G>() + spare <= index_.available<G>();
            wanted.of<G>() = needs_.of<G>() + (before.of<G>() - index_.available<G>());
        });
        if (!fits) {
            each_group([&]<class G>() {
                for (auto& source : sources_.of<G>()) index_.release(std::move(source.second));
            });
            give_back(std::move(grant_.trail), std::move(grant_.pages), store_);
            return Refused{wanted};
        }
        each_group([&]<class G>() { take<G>(); });
        if (request_.receives()) {
            return ReceiveAdmission(std::move(grant_), std::move(arrivals_));
        }
        if (loads_any_) {
            return LoadAdmission(std::move(grant_), std::move(hosted_), std::move(loads_));
        }
        return Admission(std::move(grant_));
    }

  private:
    template <class G>
    using Wanted = std::vector<std::pair<std::int32_t, PageRef<G, Host>>>;

    // Links to and refers to the longest run that serves; counts what is missing. Everything that
    // may fail comes first.
    void find() {
        const auto size = size_of(request_.page_size());
        // At least one token is computed, so that there are logits to sample from.
        const std::size_t reusable = (request_.tokens().size() - 1) / size;
        std::vector<NodeId> path;
        path.reserve(reusable);
        const std::size_t run =
            index_.match(std::span(request_.hashes()).first(reusable), request_.tokens(),
                         request_.salt(), !request_.recomputes() && !request_.receives(), path);
        const auto pages =
            static_cast<std::size_t>(pages_for(request_.known(), request_.page_size()).value);
        grant_.trail.reserve(pages);
        each_group([&]<class G>() {
            if (!index_.has<G>()) return;
            grant_.pages.of<G>().sealed.reserve(pages);
            grant_.pages.of<G>().promised.reserve(pages);
            sources_.of<G>().reserve(run);
            loads_.of<G>().room.reserve(pages);
            hosted_.of<G>().reserve(run);
            loads_.of<G>().pages.reserve(run);
            if (request_.receives()) arrivals_.of<G>().reserve(pages);
        });
        grant_.cached = TokenCount(static_cast<std::int32_t>(run * size));
        for (std::size_t i = 0; i < run; ++i) grant_.trail.push_back(index_.link(path[i]));
        each_group([&]<class G>() {
            if (index_.has<G>()) find<G>(path, run);
        });
    }

    template <class G>
    void find(const std::vector<NodeId>& path, std::size_t run) noexcept {
        Resting<G>& group = grant_.pages.of<G>();
        if constexpr (kPaged<G>) {
            std::size_t first = 0;
            TokenCount reach = request_.known();
            if constexpr (G::kKind == GroupKind::kWindow) {
                first = index_.window_begin(grant_.cached);
                reach = grant_.cached + std::min(reach - grant_.cached, chunk_max_);
                if (request_.receives()) {
                    reach = request_.known();
                    first = index_.window_begin(request_.known() - TokenCount(1));
                }
            }
            group.first = static_cast<std::int32_t>(first);
            for (std::size_t i = first; i < run; ++i) refer<G>(path[i], i);
            const auto pages =
                static_cast<std::size_t>(pages_for(reach, request_.page_size()).value);
            needs_.of<G>() = PageCount(
                static_cast<std::int32_t>(pages - std::max(run, first) + sources_.of<G>().size()));
        } else {
            // One page for the state, which begins as the last checkpoint's.
            if (run > 0 && !request_.receives()) refer<G>(path[run - 1], run - 1);
            needs_.of<G>() = PageCount(1);
        }
    }

    template <class G>
    void refer(NodeId node, std::size_t index) noexcept {
        if (auto ref = index_.refer<G, Device>(node)) {
            grant_.pages.of<G>().sealed.push_back(std::move(*ref));
        } else {
            sources_.of<G>().emplace_back(static_cast<std::int32_t>(index),
                                          *index_.refer<G, Host>(node));
            loads_any_ = true;
        }
    }

    template <class G>
    void take() noexcept {
        Resting<G>& group = grant_.pages.of<G>();
        std::int32_t missing = needs_.of<G>().value;
        for (auto& [index, source] : sources_.of<G>()) {
            hosted_.of<G>().push_back({index, std::move(source), *index_.take<G>()});
            --missing;
        }
        sources_.of<G>().clear();
        for (; missing > 0; --missing) {
            if constexpr (kPaged<G>) {
                group.promised.push_back(*index_.take<G>());
            } else {
                group.tail.emplace(open(*index_.take<G>()));
            }
        }
    }

    const Request& request_;
    TokenCount chunk_max_;
    PrefixIndex& index_;
    Store& store_;
    Grant grant_{};
    PageCounts needs_;
    bool loads_any_ = false;
    PerGroup<Wanted> sources_;
    PerGroup<LoadAdmission::Hosted> hosted_;
    PerGroup<Loads> loads_;
    PerGroup<Arrivals> arrivals_;
};

Probed probe(const Queued& queued, PageCount reserve, TokenCount chunk_max, Store& store) {
    return Prober(*queued.request, chunk_max, store).run(reserve);
}

void cancel(Admission&& ticket, Store& store) noexcept {
    give_back(std::move(ticket.grant_.trail), std::move(ticket.grant_.pages), store);
}

void cancel(LoadAdmission&& ticket, Store& store) noexcept {
    each_group([&]<class G>() {
        for (auto& found : ticket.hosted_.of<G>()) {
            store.index.release(std::move(found.source));
            store.index.give<G>(std::move(found.target));
        }
        ticket.hosted_.of<G>().clear();
    });
    give_back(std::move(ticket.grant_.trail), std::move(ticket.grant_.pages), store);
}

void cancel(ReceiveAdmission&& ticket, Store& store) noexcept {
    give_back(std::move(ticket.grant_.trail), std::move(ticket.grant_.pages), store);
}

Prefilling admit(Queued&& queued, Admission&& ticket, Slot&& slot) noexcept {
    Grant& grant = ticket.grant_;
    queued.request->admitted(grant.cached);
    return {std::move(queued.request), std::move(slot), std::move(grant.trail),
            std::move(grant.pages), grant.cached};
}

Loading load(Queued&& queued, LoadAdmission&& ticket, Slot&& slot, TransferId transfer) noexcept {
    Grant& grant = ticket.grant_;
    queued.request->admitted(grant.cached);
    each_group([&]<class G>() {
        for (auto& found : ticket.hosted_.of<G>()) {
            ticket.room_.of<G>().pages.push_back({found.index,
                                                  depart(std::move(found.source), transfer),
                                                  depart(open(std::move(found.target)), transfer)});
        }
        ticket.hosted_.of<G>().clear();
    });
    return {std::move(queued.request), std::move(slot),         std::move(grant.trail),
            std::move(grant.pages),    std::move(ticket.room_), grant.cached};
}

Receiving receive(Queued&& queued, ReceiveAdmission&& ticket, Slot&& slot,
                  TransferId transfer) noexcept {
    Grant& grant = ticket.grant_;
    queued.request->admitted(grant.cached);
    const std::size_t page_size = size_of(queued.request->page_size());
    const auto written = static_cast<std::size_t>(queued.request->known().value) - 1;
    each_group([&]<class G>() {
        Resting<G>& group = grant.pages.of<G>();
        Arrivals<G>& arrivals = ticket.room_.of<G>();
        if constexpr (kPaged<G>) {
            const std::size_t begin = static_cast<std::size_t>(group.first) + group.sealed.size();
            for (std::size_t i = begin; i * page_size < written && !group.promised.empty(); ++i) {
                arrivals.push_back(depart(open(std::move(group.promised.back())), transfer));
                group.promised.pop_back();
            }
        } else if (group.tail) {
            arrivals.push_back(depart(std::move(*group.tail), transfer));
            group.tail.reset();
        }
    });
    return {std::move(queued.request), std::move(slot), std::move(grant.trail),
            std::move(grant.pages), std::move(ticket.room_)};
}

}  // namespace tokenspeed::control
