#include "transitions.h"

#include <algorithm>
#include <cassert>

#include "holdings.h"
#include "room.h"

namespace tokenspeed::control {

namespace {

// --- in the air ---

template <class G>
void take_off(Resting<G>&& from, Flying<G>& to, StepId step) noexcept {
    to.first = from.first;
    to.sealed = std::move(from.sealed);
    to.promised = std::move(from.promised);
    if (from.tail) to.lent.push_back(lend(std::move(*from.tail), step));
}

// Moves the leases a chunk writes to `step`, and lends promised pages as far as it reaches.
template <class G>
void lend_chunk(Flying<G>& pages, TokenCount fed, TokenCount chunk, std::size_t page_size,
                StepId step) noexcept {
    const auto end = static_cast<std::size_t>((fed + chunk).value);
    if constexpr (kPaged<G>) {
        const std::size_t base = static_cast<std::size_t>(pages.first) + pages.sealed.size();
        const std::size_t last = (end - 1) / page_size;
        for (std::size_t index = static_cast<std::size_t>(fed.value) / page_size; index <= last;
             ++index) {
            if (index < base + pages.lent.size()) {
                auto& lease = pages.lent[index - base];
                if (lease.until() < step) lease = extend(std::move(lease), step);
            } else {
                pages.lent.push_back(lend(open(std::move(pages.promised.back())), step));
                pages.promised.pop_back();
            }
        }
    } else {
        auto& state = pages.lent.front();
        if (state.until() < step) state = extend(std::move(state), step);
        if (end % page_size == 0 && !pages.promised.empty()) {
            pages.saved.push_back({static_cast<std::int32_t>(end / page_size) - 1,
                                   lend(open(std::move(pages.promised.back())), step)});
            pages.promised.pop_back();
        }
    }
}

void lend_chunk(Stepping& request, TokenCount chunk, StepId step) noexcept {
    const std::size_t page_size = size_of(request.request->page_size());
    each_group([&]<class G>() {
        auto& pages = request.pages.of<G>();
        // A group the model does not have has neither.
        if (pages.lent.empty() && pages.promised.empty()) return;
        lend_chunk<G>(pages, request.fed, chunk, page_size, step);
    });
    request.fed += chunk;
    if (request.fed == request.request->known() + request.pending) request.pending += TokenCount(1);
    request.last = step;
}

template <class G>
std::size_t leases_back(const Flying<G>& pages, const Retired& done) noexcept {
    const auto out = std::ranges::find_if(
        pages.lent, [&](const auto& lease) { return !done.covers(lease.until()); });
    return static_cast<std::size_t>(out - pages.lent.begin());
}

template <class G>
void clear_replaced(Flying<G>& pages, const Retired& done, Store& store) noexcept {
    std::erase_if(pages.replaced, [&](InFlight<SealedPage<G>>& lease) {
        if (!done.covers(lease.until())) return false;
        store.index.give<G>(reclaim(std::move(lease), done));
        return true;
    });
}

// Seals what the retired step filled; the page it left in part comes back open.
template <class G>
std::optional<OpenPage<G>> land_pages(Flying<G>& pages, const Stepping& request,
                                      const Retired& done, TokenCount written, Store& store,
                                      std::vector<Swap>& swaps) noexcept {
    const std::size_t page_size = size_of(request.request->page_size());
    const bool flies_on = !done.covers(request.last);
    const std::size_t back = leases_back(pages, done);
    std::optional<OpenPage<G>> tail;
    for (std::size_t i = 0; i < back; ++i) {
        OpenPage<G> page = reclaim(std::move(pages.lent[i]), done);
        const std::size_t index = static_cast<std::size_t>(pages.first) + pages.sealed.size();
        if ((index + 1) * page_size > static_cast<std::size_t>(written.value)) {
            tail.emplace(std::move(page));
            break;
        }
        std::optional<SealedPage<G>> duplicate;
        seal_into<G>(pages.sealed, index, seal(std::move(page), done), request.trail, swaps,
                     duplicate, store);
        if (!duplicate) continue;
        if (flies_on) {
            pages.replaced.push_back(lend(std::move(*duplicate), request.last));
        } else {
            store.index.give<G>(std::move(*duplicate));
        }
    }
    pages.lent.erase(pages.lent.begin(), pages.lent.begin() + static_cast<std::ptrdiff_t>(back));
    clear_replaced(pages, done, store);
    release_behind(pages.first, pages.sealed, written, store);
    assert((!flies_on || !tail) && "a step in flight writes the page a retired one left in part");
    return tail;
}

// Keeps the states that the retired step copied; its own comes back when nothing flies on.
std::optional<OpenPage<Recurrent>> land_state(Flying<Recurrent>& pages, const Stepping& request,
                                              const Retired& done, Store& store) noexcept {
    store.index.release(std::move(pages.sealed));
    pages.sealed.clear();
    std::erase_if(pages.saved, [&](Checkpoint& saved) {
        if (!done.covers(saved.page.until())) return false;
        auto [ref, duplicate] =
            store.index.shelve<Recurrent>(seal(reclaim(std::move(saved.page), done), done),
                                          request.trail[static_cast<std::size_t>(saved.index)]);
        if (duplicate) store.index.give<Recurrent>(std::move(*duplicate));
        store.index.release(std::move(ref));
        return true;
    });
    std::optional<OpenPage<Recurrent>> state;
    if (leases_back(pages, done) > 0) {
        state.emplace(reclaim(std::move(pages.lent.front()), done));
        pages.lent.clear();
    }
    return state;
}

template <class G>
Resting<G> settle(Flying<G>&& pages, std::optional<OpenPage<G>>&& tail) noexcept {
    return {pages.first, std::move(pages.sealed), std::move(tail), std::move(pages.promised)};
}

template <class State>
Finished clear_out(State&& request, FinishReason reason, Store& store) noexcept {
    give_back(std::move(request.trail), std::move(request.pages), store);
    if constexpr (requires { request.slot; }) store.slots.give(std::move(request.slot));
    const RequestBox box = std::move(request.request);
    return {box->id(), reason};
}

template <class State>
Queued send_back(State&& request, Store& store) noexcept {
    give_back(std::move(request.trail), std::move(request.pages), store);
    if constexpr (requires { request.slot; }) store.slots.give(std::move(request.slot));
    request.request->retracted();
    return Queued(std::move(request.request));
}

}  // namespace

// --- launching ----------------------------------------------------------------------------------

Berth::Berth(const PerGroup<Resting>& pages, std::size_t touched) {
    each_group([&]<class G>() {
        const Resting<G>& group = pages.of<G>();
        // A group that the model does not have has neither.
        if (!group.tail && group.promised.empty()) return;
        room_.of<G>().lent.reserve(touched);
        if constexpr (!kPaged<G>) room_.of<G>().saved.reserve(1);
    });
}

Berth::Berth(const Prefilling& request, TokenCount chunk)
    : Berth(request.pages, touched(chunk, request.request->page_size())) {}

Berth::Berth(const Decoding& request)
    : Berth(request.pages, touched(TokenCount(1), request.request->page_size())) {}

Berth::Berth(const Stepping& request, TokenCount chunk) {
    each_group([&]<class G>() {
        const Flying<G>& group = request.pages.of<G>();
        if (group.lent.empty() && group.promised.empty()) return;
        room_.of<G>().lent.reserve(touched(chunk, request.request->page_size()) +
                                   group.lent.size());
        if constexpr (!kPaged<G>) room_.of<G>().saved.reserve(1 + group.saved.size());
    });
}

Stepping launch(Prefilling&& request, StepId step, TokenCount chunk, Berth&& berth) noexcept {
    each_group(
        [&]<class G>() { take_off(std::move(request.pages.of<G>()), berth.room_.of<G>(), step); });
    Stepping flying{std::move(request.request),
                    std::move(request.slot),
                    std::move(request.trail),
                    std::move(berth.room_),
                    request.fed,
                    TokenCount(0),
                    step};
    lend_chunk(flying, chunk, step);
    return flying;
}

Stepping launch(Decoding&& request, StepId step, Berth&& berth) noexcept {
    const TokenCount fed = request.request->known() - TokenCount(1);
    return launch(Prefilling{std::move(request.request), std::move(request.slot),
                             std::move(request.trail), std::move(request.pages), fed},
                  step, TokenCount(1), std::move(berth));
}

Stepping extend(Stepping&& request, StepId next, TokenCount chunk, Berth&& berth) noexcept {
    each_group([&]<class G>() {
        Flying<G>& room = berth.room_.of<G>();
        Flying<G>& pages = request.pages.of<G>();
        for (auto& lease : pages.lent) room.lent.push_back(std::move(lease));
        pages.lent = std::move(room.lent);
        for (auto& saved : pages.saved) room.saved.push_back(std::move(saved));
        pages.saved = std::move(room.saved);
    });
    lend_chunk(request, chunk, next);
    return std::move(request);
}

namespace {

template <class G>
PageCount short_of(std::size_t held, TokenCount end, TokenCount page_size) noexcept {
    if constexpr (!kPaged<G>) return PageCount(0);
    const std::int32_t short_by = pages_for(end, page_size).value - static_cast<std::int32_t>(held);
    return PageCount(std::max(short_by, 0));
}

template <class G>
PageCount short_of(const Resting<G>& pages, TokenCount end, TokenCount page_size) noexcept {
    return short_of<G>(static_cast<std::size_t>(pages.first) + pages.sealed.size() +
                           (pages.tail ? 1 : 0) + pages.promised.size(),
                       end, page_size);
}

}  // namespace

template <class G>
PageCount lacks(const Prefilling& request, TokenCount end) noexcept {
    return short_of(request.pages.of<G>(), end, request.request->page_size());
}
template <class G>
PageCount lacks(const Decoding& request, TokenCount end) noexcept {
    return short_of(request.pages.of<G>(), end, request.request->page_size());
}
template <class G>
PageCount lacks(const Stepping& request, TokenCount end) noexcept {
    const Flying<G>& pages = request.pages.of<G>();
    return short_of<G>(static_cast<std::size_t>(pages.first) + pages.sealed.size() +
                           pages.lent.size() + pages.promised.size(),
                       end, request.request->page_size());
}

// --- landing ------------------------------------------------------------------------------------

void reserve_landing(Stepping& request, std::vector<Swap>& swaps) {
    const auto full =
        static_cast<std::size_t>(request.fed.value) / size_of(request.request->page_size());
    if (full > request.trail.capacity()) {
        make_room_for(request.trail, full - request.trail.size());
    }
    std::size_t lent = 0;
    each_group([&]<class G>() {
        Flying<G>& pages = request.pages.of<G>();
        make_room_for(pages.sealed, pages.lent.size());
        make_room_for(pages.replaced, pages.lent.size());
        lent += pages.lent.size();
    });
    make_room_for(swaps, lent);
}

Landed land(Stepping&& request, const Retired& done, TokenCount written, Store& store,
            std::vector<Swap>& swaps) noexcept {
    extend_trail(request.trail, *request.request, written, store);
    PerGroup<Resting> rest;
    const bool flies_on = !done.covers(request.last);
    each_group([&]<class G>() {
        Flying<G>& pages = request.pages.of<G>();
        std::optional<OpenPage<G>> tail;
        if constexpr (kPaged<G>) {
            tail = land_pages<G>(pages, request, done, written, store, swaps);
        } else {
            tail = land_state(pages, request, done, store);
        }
        if (!flies_on) rest.of<G>() = settle(std::move(pages), std::move(tail));
    });
    if (flies_on) return Landed(std::move(request));
    if (request.fed < request.request->known_at_admission()) {
        return Prefilling{std::move(request.request), std::move(request.slot),
                          std::move(request.trail), std::move(rest), request.fed};
    }
    return Decoding{std::move(request.request), std::move(request.slot), std::move(request.trail),
                    std::move(rest)};
}

Ended land(Doomed&& request, const Retired& done, Store& store) noexcept {
    if (!done.covers(request.last)) return Ended(std::move(request));
    each_group([&]<class G>() {
        Flying<G>& pages = request.pages.of<G>();
        for (auto& lease : pages.lent) store.index.give<G>(reclaim(std::move(lease), done));
        for (auto& lease : pages.replaced) store.index.give<G>(reclaim(std::move(lease), done));
        for (auto& lease : request.guesses.of<G>()) {
            store.index.give<G>(reclaim(std::move(lease), done));
        }
        if constexpr (!kPaged<G>) {
            for (auto& saved : pages.saved) {
                store.index.give<G>(reclaim(std::move(saved.page), done));
            }
        }
        store.index.release(std::move(pages.sealed));
    });
    store.index.release(std::move(request.trail));
    store.slots.give(std::move(request.slot));
    return Finished{request.id, request.reason};
}

// --- giving way ---------------------------------------------------------------------------------

Parked park(Decoding&& request, Store& store) noexcept {
    store.slots.give(std::move(request.slot));
    return {std::move(request.request), std::move(request.trail), std::move(request.pages)};
}

Prefilling resume(Parked&& request, Slot&& slot) noexcept {
    request.request->resumed();
    const TokenCount fed = request.request->known() - TokenCount(1);
    return {std::move(request.request), std::move(slot), std::move(request.trail),
            std::move(request.pages), fed};
}

Queued retract(Prefilling&& request, Store& store) noexcept {
    return send_back(std::move(request), store);
}

Queued retract(Decoding&& request, Store& store) noexcept {
    return send_back(std::move(request), store);
}

Queued retract(Parked&& request, Store& store) noexcept {
    return send_back(std::move(request), store);
}

// --- leaving ------------------------------------------------------------------------------------

Finished finish(Queued&& request, FinishReason reason) noexcept {
    const RequestBox box = std::move(request.request);
    return {box->id(), reason};
}

Finished finish(Prefilling&& request, FinishReason reason, Store& store) noexcept {
    return clear_out(std::move(request), reason, store);
}

Finished finish(Decoding&& request, FinishReason reason, Store& store) noexcept {
    return clear_out(std::move(request), reason, store);
}

Finished finish(Parked&& request, FinishReason reason, Store& store) noexcept {
    return clear_out(std::move(request), reason, store);
}

Doomed doom(Stepping&& request, FinishReason reason, Store& store) noexcept {
    each_group([&]<class G>() { give_back<G>(std::move(request.pages.of<G>().promised), store); });
    const RequestBox box = std::move(request.request);
    return {box->id(),
            reason,
            std::move(request.slot),
            std::move(request.trail),
            std::move(request.pages),
            {},
            request.last};
}

Cancelled cancel(Loading&& request, FinishReason reason, Store& store) noexcept {
    give_back(std::move(request.trail), std::move(request.pages), store);
    const RequestBox box = std::move(request.request);
    return {box->id(), reason, std::move(request.slot), std::move(request.loads), {}};
}

Cancelled cancel(Receiving&& request, FinishReason reason, Store& store) noexcept {
    give_back(std::move(request.trail), std::move(request.pages), store);
    const RequestBox box = std::move(request.request);
    return {box->id(), reason, std::move(request.slot), {}, std::move(request.arrivals)};
}

#define TOKENSPEED_FOR_GROUP(G)                                          \
    template PageCount lacks<G>(const Prefilling&, TokenCount) noexcept; \
    template PageCount lacks<G>(const Decoding&, TokenCount) noexcept;   \
    template PageCount lacks<G>(const Stepping&, TokenCount) noexcept;
TOKENSPEED_FOR_GROUP(Full)
TOKENSPEED_FOR_GROUP(Window)
TOKENSPEED_FOR_GROUP(Latent)
TOKENSPEED_FOR_GROUP(Recurrent)
#undef TOKENSPEED_FOR_GROUP

}  // namespace tokenspeed::control
