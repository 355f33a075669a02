#include "requests.h"

#include <algorithm>
#include <limits>

#include "room.h"

namespace tokenspeed::control {

namespace {

TokenCount clamp(std::int64_t count) {
    return TokenCount(static_cast<std::int32_t>(
        std::min<std::int64_t>(count, std::numeric_limits<std::int32_t>::max())));
}

}  // namespace

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

void Request::reserve_tokens(std::size_t more) {
    make_room_for(tokens_, more);
    make_room_for(hashes_, more / size_of(page_size_) + 1);
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

TokenCount Request::outputs_max() const noexcept {
    return clamp(wish_.max_new_tokens);
}

bool Request::exhausted(TokenCount pending, TokenCount context_max) const noexcept {
    return pending >= remaining(context_max);
}

TokenCount Request::remaining(TokenCount context_max) const noexcept {
    const TokenCount most = sends() ? TokenCount(1) : clamp(wish_.max_new_tokens);
    return std::min(most - outputs(), context_max - known());
}

std::optional<FinishReason> Request::end_at(TokenCount more, std::int32_t token,
                                            TokenCount context_max) const noexcept {
    // The sampler gives no stop token before min_new_tokens others; one that came all the same
    // (its position is outputs - 1) does not stop.
    if (outputs() + more > clamp(wish_.min_new_tokens) &&
        std::ranges::binary_search(wish_.stop_token_ids, token)) {
        return FinishReason::kStop;
    }
    if (exhausted(more, context_max)) return FinishReason::kLength;
    return std::nullopt;
}

void Request::admitted(TokenCount cached) noexcept {
    if (!cached_) cached_ = cached;
    known_at_admission_ = known();
}

}  // namespace tokenspeed::control
