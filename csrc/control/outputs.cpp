#include "outputs.h"

#include <algorithm>
#include <numeric>

namespace tokenspeed::control {

void OutputHistory::add(TokenCount outputs) noexcept {
    auto end = sorted_.begin() + static_cast<std::ptrdiff_t>(count_);
    if (count_ == kMemory) {
        const auto gone = std::lower_bound(sorted_.begin(), end, recent_[oldest_]);
        std::copy(gone + 1, end, gone);
        --end;
    } else {
        ++count_;
    }
    const auto place = std::upper_bound(sorted_.begin(), end, outputs.value);
    std::copy_backward(place, end, end + 1);
    *place = outputs.value;
    recent_[oldest_] = outputs.value;
    oldest_ = (oldest_ + 1) % kMemory;
}

std::optional<TokenCount> OutputHistory::expected(TokenCount so_far,
                                                  TokenCount most) const noexcept {
    if (count_ < kEnough) return std::nullopt;
    const auto end = sorted_.begin() + static_cast<std::ptrdiff_t>(count_);
    const auto longer = std::upper_bound(sorted_.begin(), end, so_far.value);
    // Longer than all: it may be of another sort, so let it go on for as long again.
    if (longer == end) return std::min(so_far + so_far, most);
    const std::int64_t sum = std::accumulate(longer, end, std::int64_t{0});
    return std::min(TokenCount(static_cast<std::int32_t>(sum / (end - longer))), most);
}

PageCount peak_growth(std::span<Growth> requests, TokenCount page_size) noexcept {
    std::ranges::sort(requests, {}, &Growth::remaining);
    std::int64_t peak = 0, freed = 0;
    auto left = static_cast<std::int64_t>(requests.size());
    for (const Growth& request : requests) {
        // When this one is about to end, it and those after it have grown by what it had to go.
        const std::int64_t grown = left * request.remaining.value / page_size.value;
        peak = std::max(peak, grown - freed);
        freed += request.owned.value;
        --left;
    }
    return PageCount(static_cast<std::int32_t>(peak));
}

}  // namespace tokenspeed::control
