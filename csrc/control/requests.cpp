#include "requests.h"

#include <algorithm>
#include <cassert>
#include <limits>

#include "room.h"

namespace tokenspeed::control {

namespace {

std::size_t size_of(TokenCount page_size) {
    return static_cast<std::size_t>(page_size.value);
}

TokenCount clamp(std::int64_t count) {
    return TokenCount(static_cast<std::int32_t>(
        std::min<std::int64_t>(count, std::numeric_limits<std::int32_t>::max())));
}

template <class G>
void give_back(std::vector<FreePage<G>>&& promised, Store& store) noexcept {
    for (FreePage<G>& page : promised) store.index.give<G>(std::move(page));
    promised.clear();
}

void give_back(Trail&& trail, PerGroup<Resting>&& pages, Store& store) noexcept {
    each_group([&]<class G>() {
        Resting<G>& group = pages.of<G>();
        if (group.tail) store.index.give<G>(std::move(*group.tail));
        give_back<G>(std::move(group.promised), store);
        store.index.release(std::move(group.sealed));
    });
    store.index.release(std::move(trail));
}

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

// --- back on the ground ---

template <class G>
void seal_into(std::vector<PageRef<G>>& sealed, std::size_t index, SealedPage<G>&& page,
               const Trail& trail, std::vector<Swap>& swaps,
               std::optional<SealedPage<G>>& duplicate, Store& store) noexcept {
    auto shelved = store.index.shelve<G>(std::move(page), trail[index]);
    sealed.push_back(std::move(shelved.ref));
    if (!shelved.duplicate) return;
    swaps.push_back({G::kKind, static_cast<std::int32_t>(index), sealed.back().id().value});
    duplicate.emplace(std::move(*shelved.duplicate));
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
    if constexpr (G::kKind == GroupKind::kWindow) {
        const std::size_t begin = store.index.window_begin(written);
        std::size_t behind = 0;
        for (;
             behind < pages.sealed.size() && static_cast<std::size_t>(pages.first) + behind < begin;
             ++behind) {
            store.index.release_behind(std::move(pages.sealed[behind]));
        }
        pages.sealed.erase(pages.sealed.begin(),
                           pages.sealed.begin() + static_cast<std::ptrdiff_t>(behind));
        pages.first += static_cast<std::int32_t>(behind);
    }
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

void extend_trail(Trail& trail, const Request& request, TokenCount written, Store& store) noexcept {
    const auto full = static_cast<std::size_t>(written.value) / size_of(request.page_size());
    while (trail.size() < full) {
        trail.push_back(
            store.index.enter(request.page(trail.size()), trail.empty() ? nullptr : &trail.back()));
    }
}

template <class G>
Resting<G> settle(Flying<G>&& pages, std::optional<OpenPage<G>>&& tail) noexcept {
    return {pages.first, std::move(pages.sealed), std::move(tail), std::move(pages.promised)};
}

}  // namespace

// --- Request ------------------------------------------------------------------------------------

Request::Request(Submission&& wish, Order order, TokenCount page_size)
    : wish_(std::move(wish)),
      order_(order),
      page_size_(page_size),
      prompt_(static_cast<std::int32_t>(wish_.prompt.size())),
      tokens_(std::move(wish_.prompt)) {
    std::ranges::sort(wish_.stop_token_ids);
    make_room_for(hashes_, tokens_.size() / size_of(page_size_) + 1);
    hash_full_pages();
}

PageContent Request::page(std::size_t index) const noexcept {
    return {hashes_[index], wish_.salt,
            std::span(tokens_).subspan(index * size_of(page_size_), size_of(page_size_))};
}

void Request::reserve_token() {
    make_room_for(tokens_, 1);
    make_room_for(hashes_, 1);
}

void Request::append(std::int32_t token) noexcept {
    tokens_.push_back(token);
    hash_full_pages();
}

void Request::hash_full_pages() noexcept {
    const std::size_t size = size_of(page_size_);
    while ((hashes_.size() + 1) * size <= tokens_.size()) {
        const Hash128 before = hashes_.empty() ? hash_root(wish_.salt) : hashes_.back();
        hashes_.push_back(
            hash_page(before, std::span(tokens_).subspan(hashes_.size() * size, size)));
    }
}

bool Request::exhausted(TokenCount pending, TokenCount context_max) const noexcept {
    const TokenCount most = sends() ? TokenCount(1) : clamp(wish_.max_new_tokens);
    return outputs() + pending >= most || known() + pending >= context_max;
}

std::optional<FinishReason> Request::end(TokenCount context_max) const noexcept {
    // The sampler gives no stop token before min_new_tokens others; one that came all the same
    // (its position is outputs - 1) does not stop.
    if (outputs() > clamp(wish_.min_new_tokens) &&
        std::ranges::binary_search(wish_.stop_token_ids, tokens_.back())) {
        return FinishReason::kStop;
    }
    if (exhausted(TokenCount(0), context_max)) return FinishReason::kLength;
    return std::nullopt;
}

void Request::admitted(TokenCount cached) noexcept {
    if (!cached_) cached_ = cached;
    known_at_admission_ = known();
}

// --- admission ----------------------------------------------------------------------------------

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
                reach = std::min(reach, grant_.cached + chunk_max_);
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

// --- launching ----------------------------------------------------------------------------------

namespace {

std::size_t touched(TokenCount chunk, TokenCount page_size) {
    return static_cast<std::size_t>(pages_for(chunk, page_size).value) + 1;
}

}  // namespace

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
    each_group([&]<class G>() {
        Flying<G>& pages = request.pages.of<G>();
        make_room_for(pages.sealed, pages.lent.size());
        make_room_for(pages.replaced, pages.lent.size());
        make_room_for(swaps, pages.lent.size());
    });
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

// --- transfers ----------------------------------------------------------------------------------

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
    each_group([&]<class G>() { make_room_for(swaps, request.loads.of<G>().pages.size()); });
}

void reserve_arrival(Receiving& request, std::vector<Swap>& swaps) {
    make_room_for(request.trail, 0);
    const auto full = static_cast<std::size_t>(request.request->known().value) /
                      size_of(request.request->page_size());
    if (full > request.trail.size()) make_room_for(request.trail, full - request.trail.size());
    each_group([&]<class G>() { make_room_for(swaps, request.arrivals.of<G>().size()); });
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
