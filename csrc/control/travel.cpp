// Requests whose pages travel between tiers or engines.

#include <algorithm>

#include "holdings.h"
#include "room.h"
#include "transitions.h"

namespace tokenspeed::control {

Manifest::Manifest(const Stepping& request) {
    each_group([&]<class G>() {
        const Flying<G>& pages = request.pages.of<G>();
        room_.of<G>().sealed.reserve(pages.sealed.size() + pages.lent.size());
        room_.of<G>().tail.reserve(1);
    });
}

Sending send(Decoding&& request, FinishReason reason, TransferId transfer, Manifest&& manifest,
             Store& store) noexcept {
    each_group([&]<class G>() {
        Resting<G>& pages = request.pages.of<G>();
        Departures<G>& departures = manifest.room_.of<G>();
        departures.first = pages.first;
        for (auto& ref : pages.sealed) {
            departures.sealed.push_back(depart(std::move(ref), transfer));
        }
        if (pages.tail) departures.tail.push_back(depart(std::move(*pages.tail), transfer));
        give_back<G>(std::move(pages.promised), store);
    });
    const RequestBox box = std::move(request.request);
    return {box->id(), reason, std::move(request.slot), std::move(request.trail),
            std::move(manifest.room_)};
}

void reserve_arrival(Loading& request, std::vector<Swap>& swaps) {
    std::size_t pages = 0;
    each_group([&]<class G>() { pages += request.loads.of<G>().pages.size(); });
    make_room_for(swaps, pages);
}

void reserve_arrival(Receiving& request, std::vector<Swap>& swaps) {
    make_room_for(request.trail, 0);
    const auto full = static_cast<std::size_t>(request.request->known().value) /
                      size_of(request.request->page_size());
    if (full > request.trail.size()) make_room_for(request.trail, full - request.trail.size());
    std::size_t pages = 0;
    each_group([&]<class G>() { pages += request.arrivals.of<G>().size(); });
    make_room_for(swaps, pages);
}

Prefilling arrive(Loading&& request, const Arrived& done, Store& store,
                  std::vector<Swap>& swaps) noexcept {
    each_group([&]<class G>() {
        Resting<G>& pages = request.pages.of<G>();
        // What the device held already and what came, by the order of their pages.
        std::vector<PageRef<G>> held = std::move(pages.sealed);
        pages.sealed = std::move(request.loads.of<G>().room);
        auto next = held.begin();
        for (Inbound<G>& load : request.loads.of<G>().pages) {
            store.index.release(reclaim(std::move(load.source), done));
            OpenPage<G> page = reclaim(std::move(load.target), done);
            if constexpr (!kPaged<G>) {
                pages.tail.emplace(std::move(page));
            } else {
                while (pages.first + static_cast<std::int32_t>(pages.sealed.size()) < load.index) {
                    pages.sealed.push_back(std::move(*next++));
                }
                std::optional<SealedPage<G>> duplicate;
                seal_into<G>(pages.sealed, static_cast<std::size_t>(load.index),
                             seal(std::move(page), done), request.trail, swaps, duplicate, store);
                if (duplicate) store.index.give<G>(std::move(*duplicate));
            }
        }
        while (next != held.end()) pages.sealed.push_back(std::move(*next++));
    });
    return {std::move(request.request), std::move(request.slot), std::move(request.trail),
            std::move(request.pages), request.fed};
}

Prefilling arrive(Receiving&& request, const Arrived& done, Store& store,
                  std::vector<Swap>& swaps) noexcept {
    const TokenCount written = request.request->known() - TokenCount(1);
    const std::size_t page_size = size_of(request.request->page_size());
    extend_trail(request.trail, *request.request, written, store);
    each_group([&]<class G>() {
        Resting<G>& pages = request.pages.of<G>();
        for (auto& arrival : request.arrivals.of<G>()) {
            OpenPage<G> page = reclaim(std::move(arrival), done);
            const std::size_t index = static_cast<std::size_t>(pages.first) + pages.sealed.size();
            if (!kPaged<G> || (index + 1) * page_size > static_cast<std::size_t>(written.value)) {
                pages.tail.emplace(std::move(page));
                continue;
            }
            std::optional<SealedPage<G>> duplicate;
            seal_into<G>(pages.sealed, index, seal(std::move(page), done), request.trail, swaps,
                         duplicate, store);
            if (duplicate) store.index.give<G>(std::move(*duplicate));
        }
    });
    request.request->received();
    return {std::move(request.request), std::move(request.slot), std::move(request.trail),
            std::move(request.pages), written};
}

Finished arrive(Sending&& request, const Arrived& done, Store& store) noexcept {
    each_group([&]<class G>() {
        Departures<G>& departures = request.departures.of<G>();
        for (; !departures.sealed.empty(); departures.sealed.pop_back()) {
            store.index.release(reclaim(std::move(departures.sealed.back()), done));
        }
        for (auto& page : departures.tail) store.index.give<G>(reclaim(std::move(page), done));
    });
    store.index.release(std::move(request.trail));
    store.slots.give(std::move(request.slot));
    return {request.id, request.reason};
}

namespace {

template <class State>
void take_in(State& request, const Arrived& done, Store& store) noexcept {
    each_group([&]<class G>() {
        if constexpr (requires { request.loads; }) {
            for (Inbound<G>& load : request.loads.template of<G>().pages) {
                store.index.release(reclaim(std::move(load.source), done));
                store.index.give<G>(reclaim(std::move(load.target), done));
            }
        }
        if constexpr (requires { request.arrivals; }) {
            for (auto& page : request.arrivals.template of<G>()) {
                store.index.give<G>(reclaim(std::move(page), done));
            }
        }
    });
    store.slots.give(std::move(request.slot));
}

// The request starts over, and computes what did not come.
template <class State>
Queued start_over(State&& request, const Arrived& done, Store& store) noexcept {
    take_in(request, done, store);
    give_back(std::move(request.trail), std::move(request.pages), store);
    request.request->recompute();
    return Queued(std::move(request.request));
}

}  // namespace

Finished arrive(Cancelled&& request, const Arrived& done, Store& store) noexcept {
    take_in(request, done, store);
    return {request.id, request.reason};
}

Queued fail(Loading&& request, const Arrived& done, Store& store) noexcept {
    return start_over(std::move(request), done, store);
}

Queued fail(Receiving&& request, const Arrived& done, Store& store) noexcept {
    return start_over(std::move(request), done, store);
}

Finished fail(Sending&& request, const Arrived& done, Store& store) noexcept {
    const Finished finished = arrive(std::move(request), done, store);
    return {finished.id, FinishReason::kAbort};
}

Finished fail(Cancelled&& request, const Arrived& done, Store& store) noexcept {
    return arrive(std::move(request), done, store);
}

}  // namespace tokenspeed::control
