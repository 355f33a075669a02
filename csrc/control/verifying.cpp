// A draft's way: launched, verified, landed or doomed. What it wrote beyond the samples that count
// is nobody's.

#include <algorithm>
#include <cassert>

#include "holdings.h"
#include "overloaded.h"
#include "room.h"
#include "transitions.h"

namespace tokenspeed::control {

Draft::Draft(const Decoding& request, std::vector<std::int32_t>&& tokens)
    : tokens_(std::move(tokens)) {
    const TokenCount fed(static_cast<std::int32_t>(tokens_.size()) + 1);
    each_group([&]<class G>() {
        const Resting<G>& group = request.pages.of<G>();
        if (!group.tail && group.promised.empty()) return;
        room_.of<G>().reserve(touched(fed, request.request->page_size()));
    });
}

Verifying speculate(Decoding&& request, StepId step, Draft&& draft) noexcept {
    assert(!draft.tokens_.empty());
    const std::size_t page_size = size_of(request.request->page_size());
    const auto begin = static_cast<std::size_t>(request.request->known().value) - 1;
    const std::size_t last = (begin + draft.tokens_.size()) / page_size;
    each_group([&]<class G>() {
        Resting<G>& pages = request.pages.of<G>();
        Guessed<G>& guesses = draft.room_.of<G>();
        assert((kPaged<G> || !pages.tail) && "a recurrence was given a draft");
        // A group that the model does not have has neither.
        if (!pages.tail && pages.promised.empty()) return;
        std::size_t index = begin / page_size;
        if (pages.tail) {
            guesses.push_back(lend(guess(std::move(*pages.tail)), step));
            pages.tail.reset();
            ++index;
        }
        for (; index <= last; ++index) {
            guesses.push_back(lend(guess(open(std::move(pages.promised.back()))), step));
            pages.promised.pop_back();
        }
    });
    return {std::move(request.request),
            std::move(request.slot),
            std::move(request.trail),
            std::move(request.pages),
            std::move(draft.room_),
            std::move(draft.tokens_),
            step};
}

Verified verify(const Verifying& request, std::span<const std::int32_t> samples,
                TokenCount context_max) noexcept {
    const std::vector<std::int32_t>& draft = request.draft;
    assert(!samples.empty() && samples.size() <= draft.size() + 1);
    std::size_t count = 0, accepted = 0;
    for (bool goes_on = true; goes_on;) {
        const std::int32_t sample = samples[count++];
        goes_on = count < samples.size() && draft[count - 1] == sample;
        if (goes_on) ++accepted;
        const TokenCount more(static_cast<std::int32_t>(count));
        if (request.request->end_at(more, sample, context_max)) goes_on = false;
    }
    const TokenCount tokens(static_cast<std::int32_t>(count));
    return {request.request->id(), samples.first(count),
            TokenCount(static_cast<std::int32_t>(accepted)),
            request.request->known() + tokens - TokenCount(1)};
}

void reserve_landing(Verifying& request, std::vector<Swap>& swaps) {
    request.request->reserve_tokens(request.draft.size() + 1);
    const auto written =
        static_cast<std::size_t>(request.request->known().value) + request.draft.size();
    const std::size_t full = written / size_of(request.request->page_size());
    if (full > request.trail.capacity()) {
        make_room_for(request.trail, full - request.trail.size());
    }
    std::size_t lent = 0;
    each_group([&]<class G>() {
        make_room_for(request.pages.of<G>().sealed, request.guesses.of<G>().size());
        lent += request.guesses.of<G>().size();
    });
    make_room_for(swaps, lent);
}

namespace {

// Sorts what the draft reached: pages verified whole are sealed, one in part stays open, and the
// rest is nobody's.
template <class G>
void settle_pages(Resting<G>& pages, Guessed<G>&& guesses, const Trail& trail, const Retired& done,
                  const Verified& verified, TokenCount page_size, Store& store,
                  std::vector<Swap>& swaps) noexcept {
    std::size_t index = static_cast<std::size_t>(pages.first) + pages.sealed.size();
    for (auto& lease : guesses) {
        std::visit(Overloaded{[&](FilledPage<G>&& page) {
                                  std::optional<SealedPage<G>> duplicate;
                                  seal_into<G>(pages.sealed, index, seal(std::move(page)), trail,
                                               swaps, duplicate, store);
                                  if (duplicate) store.index.give<G>(std::move(*duplicate));
                              },
                              [&](OpenPage<G>&& page) { pages.tail.emplace(std::move(page)); },
                              [&](FreePage<G>&& page) { store.index.give<G>(std::move(page)); }},
                   settle(reclaim(std::move(lease), done), index, page_size, verified));
        ++index;
    }
    guesses.clear();
    release_behind(pages.first, pages.sealed, verified.written(), store);
}

}  // namespace

Decoding land(Verifying&& request, const Retired& done, const Verified& verified, Store& store,
              std::vector<Swap>& swaps) noexcept {
    assert(verified.request() == request.request->id() && "a draft landed on another's proof");
    for (const std::int32_t token : verified.tokens()) request.request->append(token);
    extend_trail(request.trail, *request.request, verified.written(), store);
    each_group([&]<class G>() {
        settle_pages<G>(request.pages.of<G>(), std::move(request.guesses.of<G>()), request.trail,
                        done, verified, request.request->page_size(), store, swaps);
    });
    return {std::move(request.request), std::move(request.slot), std::move(request.trail),
            std::move(request.pages)};
}

Doomed doom(Verifying&& request, FinishReason reason, Store& store) noexcept {
    PerGroup<Flying> pages;
    each_group([&]<class G>() {
        Resting<G>& resting = request.pages.of<G>();
        give_back<G>(std::move(resting.promised), store);
        pages.of<G>().first = resting.first;
        pages.of<G>().sealed = std::move(resting.sealed);
    });
    const RequestBox box = std::move(request.request);
    return {box->id(),
            reason,
            std::move(request.slot),
            std::move(request.trail),
            std::move(pages),
            std::move(request.guesses),
            request.last};
}

}  // namespace tokenspeed::control
