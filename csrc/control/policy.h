// The scheduler's judgements, apart from its mechanics.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "prefix_index.h"
#include "requests.h"

namespace tokenspeed::control {

// As many retractions of a request make a difference.
inline constexpr std::int32_t kDoublingsMax = 4;

// Pages an admission leaves to those who run already, two for each and itself: any of them may need
// its next page at any step, and whoever took the last would be retracted soon. A request that was
// retracted before comes back only to twice the room each time, so that a full pool does not
// thrash. With nobody running nothing is left: whatever fits the pool is admitted in the end.
inline PageCount admission_reserve(std::size_t running, const Request& request) noexcept {
    if (running == 0) return PageCount(0);
    const std::int32_t doublings = std::min(request.retractions(), kDoublingsMax);
    return PageCount(static_cast<std::int32_t>((2 * (running + 1)) << doublings));
}

// A request that was brought back is not sent away again before it made progress.
inline bool may_be_retracted(const Request& request) noexcept {
    return request.retractions() == 0 || request.progressed();
}

// Whether so many tokens of a request can ever be held.
inline bool fits(TokenCount tokens, TokenCount page_size, const PrefixIndex& index) noexcept {
    bool fits = true;
    each_group([&]<class G>() {
        if (!kWhole<G> || !index.has<G>()) return;
        fits = fits && pages_for(tokens, page_size) <= index.tier<G>().pool().total();
    });
    return fits;
}

// Whether a prompt and its first token can.
inline bool may_begin(const Request& request, const PrefixIndex& index) noexcept {
    return fits(request.known() + TokenCount(1), request.page_size(), index);
}

// Whether a request that goes back to the queue can be admitted again. One that filled the pool
// cannot: its last token was never fed, and all of them have no room any more.
inline bool may_return(const Request& request, const PrefixIndex& index) noexcept {
    return fits(request.known(), request.page_size(), index);
}

}  // namespace tokenspeed::control
