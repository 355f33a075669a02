// What a step's samples say of the draft that it was given.
#pragma once

#include <cstdint>
#include <span>

#include "ids.h"

namespace tokenspeed::control {

struct Verifying;

// Proof of how far a draft was right. Only `verify` mints it, by comparing what was sampled with
// the draft itself; pages that a draft reached are sorted by showing it.
class [[nodiscard]] Verified {
  public:
    Verified(Verified&&) noexcept = default;
    Verified& operator=(Verified&&) = delete;

    // The samples that count, in order, at least one: each up to the first that differs from the
    // draft, that one included, and none after the one that ends the request.
    std::span<const std::int32_t> tokens() const noexcept { return tokens_; }
    // How many of the draft's tokens are among them.
    TokenCount accepted() const noexcept { return accepted_; }
    // Positions of the request that hold its own KV: what lies beyond was written by wrong guesses.
    TokenCount written() const noexcept { return written_; }
    RequestId request() const noexcept { return request_; }

  private:
    friend Verified verify(const Verifying& request, std::span<const std::int32_t> samples,
                           TokenCount context_max) noexcept;
    Verified(RequestId request, std::span<const std::int32_t> tokens, TokenCount accepted,
             TokenCount written) noexcept
        : request_(request), tokens_(tokens), accepted_(accepted), written_(written) {}

    RequestId request_;
    std::span<const std::int32_t> tokens_;
    TokenCount accepted_;
    TokenCount written_;
};

}  // namespace tokenspeed::control
