// What transitions share: giving pages back, and sealing them into a request's trail.
#pragma once

#include <optional>
#include <vector>

#include "states.h"
#include "transitions.h"

namespace tokenspeed::control {

template <class G>
void give_back(std::vector<FreePage<G>>&& promised, Store& store) noexcept {
    for (FreePage<G>& page : promised) store.index.give<G>(std::move(page));
    promised.clear();
}

inline void give_back(Trail&& trail, PerGroup<Resting>&& pages, Store& store) noexcept {
    each_group([&]<class G>() {
        Resting<G>& group = pages.of<G>();
        if (group.tail) store.index.give<G>(std::move(*group.tail));
        give_back<G>(std::move(group.promised), store);
        store.index.release(std::move(group.sealed));
    });
    store.index.release(std::move(trail));
}

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

// Pages that so many tokens may touch.
inline std::size_t touched(TokenCount chunk, TokenCount page_size) {
    return static_cast<std::size_t>(pages_for(chunk, page_size).value) + 1;
}

// Pages that lie behind the window of the next token return.
template <class G>
void release_behind(std::int32_t& first, std::vector<PageRef<G>>& sealed, TokenCount written,
                    Store& store) noexcept {
    if constexpr (G::kKind == GroupKind::kWindow) {
        const std::size_t begin = store.index.window_begin(written);
        std::size_t behind = 0;
        for (; behind < sealed.size() && static_cast<std::size_t>(first) + behind < begin;
             ++behind) {
            store.index.release_behind(std::move(sealed[behind]));
        }
        sealed.erase(sealed.begin(), sealed.begin() + static_cast<std::ptrdiff_t>(behind));
        first += static_cast<std::int32_t>(behind);
    }
}

inline void extend_trail(Trail& trail, const Request& request, TokenCount written,
                         Store& store) noexcept {
    const auto full = static_cast<std::size_t>(written.value) / size_of(request.page_size());
    while (trail.size() < full) {
        trail.push_back(store.index.enter(
            request.page(trail.size()), trail.empty() ? nullptr : &trail.back(), request.branch()));
    }
}

}  // namespace tokenspeed::control
