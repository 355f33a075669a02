// Why a prompt's tokens did not come from cache.
#include <algorithm>

#include "prefix_index.h"

namespace tokenspeed::control {

CacheReport PrefixIndex::explain(std::span<const Hash128> hashes,
                                 std::span<const std::int32_t> prompt,
                                 TokenCount cached) const noexcept {
    const auto size = static_cast<std::size_t>(page_size_.value);
    // The last token is always computed, and with it whatever shares its page.
    const std::size_t servable = (prompt.size() - 1) / size;
    const std::size_t served = static_cast<std::size_t>(cached.value) / size;
    std::size_t known = served;
    std::optional<NodeId> last;
    if (known > 0) last = tree_.find(hashes[known - 1]);
    for (; known < hashes.size(); ++known) {
        // A page may be known and not be served: of another group its part is gone.
        const auto node = tree_.find(hashes[known]);
        if (!node && !sessions_.remembers(hashes[known])) break;
        last = node;
    }
    std::size_t divergence = known * size;
    // Within the page that differs, as far as its likeliest neighbour goes.
    if (const auto other = last ? tree_.last_child(*last) : std::nullopt) {
        const auto rest = prompt.subspan(divergence);
        const auto [ours, theirs] = std::ranges::mismatch(rest, tree_.tokens(*other));
        divergence += static_cast<std::size_t>(ours - rest.begin());
    }
    const auto tokens = [&](std::size_t pages) {
        return TokenCount(static_cast<std::int32_t>(pages * size));
    };
    CacheReport report;
    const std::size_t held = std::clamp(known, served, std::max(served, servable));
    report.cached = cached;
    report.evicted = tokens(held - served);
    report.tail =
        TokenCount(static_cast<std::int32_t>(prompt.size())) - tokens(std::max(served, servable));
    report.unseen = TokenCount(static_cast<std::int32_t>(prompt.size())) - cached - report.evicted -
                    report.tail;
    report.divergence = TokenCount(static_cast<std::int32_t>(divergence));
    report.other_salt = known == 0 && servable > 0 && tree_.opens_elsewhere(prompt.first(size));
    return report;
}

}  // namespace tokenspeed::control
