// What a request is, whatever its state: what its client asks for, and its tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "content_tree.h"
#include "fair_queue.h"
#include "hash.h"
#include "ids.h"

namespace tokenspeed::control {

// The numbers are core.step.FinishReason's.
enum class FinishReason : std::int32_t {
    kStop = 1,
    kLength = 2,
    kAbort = 3,
    kRejected = 4,
    kRefused = 5,
};

// Priority first (lower is more urgent), then arrival.
struct Order {
    std::int32_t priority;
    std::int64_t arrival;
    friend auto operator<=>(const Order&, const Order&) = default;
};

// Where the request's KV comes from or goes to, beside this engine.
enum class Handover : std::int32_t {
    kNone = 0,
    kSend = 1,     // ends after its first token; its KV goes to another engine
    kReceive = 2,  // the KV of all its tokens but the last comes from another engine
};

// What a client asks for.
struct Submission {
    RequestId id;
    std::vector<std::int32_t> prompt;
    std::vector<std::int32_t> stop_token_ids;
    std::int64_t max_new_tokens;
    std::int64_t min_new_tokens;
    std::uint64_t salt;
    std::int32_t priority;
    Handover handover;
    TenantId tenant;
};

// What a request is, whatever its state: its wishes and its tokens, hashed as pages fill.
class Request {
  public:
    Request(Submission&& wish, Order order, TokenCount page_size);

    RequestId id() const noexcept { return wish_.id; }
    Order order() const noexcept { return order_; }
    std::uint64_t salt() const noexcept { return wish_.salt; }
    TenantId tenant() const noexcept { return wish_.tenant; }
    TokenCount outputs_max() const noexcept;
    TokenCount page_size() const noexcept { return page_size_; }
    bool sends() const noexcept { return wish_.handover == Handover::kSend; }
    bool receives() const noexcept {
        return wish_.handover == Handover::kReceive && !received_ && !recomputes_;
    }
    void received() noexcept { received_ = true; }
    // Whether a transfer failed: what it should have brought is computed.
    bool recomputes() const noexcept { return recomputes_; }
    void recompute() noexcept { recomputes_ = true; }

    const std::vector<std::int32_t>& tokens() const noexcept { return tokens_; }
    const std::vector<Hash128>& hashes() const noexcept { return hashes_; }
    TokenCount known() const noexcept {
        return TokenCount(static_cast<std::int32_t>(tokens_.size()));
    }
    TokenCount outputs() const noexcept { return known() - prompt_; }
    PageContent page(std::size_t index) const noexcept;

    // Makes room for more tokens, so that `append` cannot fail.
    void reserve_tokens(std::size_t more);
    void append(std::int32_t token) noexcept;

    // Whether `pending` sampled tokens in flight already bring the request to its end.
    bool exhausted(TokenCount pending, TokenCount context_max) const noexcept;
    // Whether the last token ends the request.
    std::optional<FinishReason> end(TokenCount context_max) const noexcept {
        return end_at(TokenCount(0), tokens_.back(), context_max);
    }
    // Whether it would end with `token` as the last of `more` tokens.
    std::optional<FinishReason> end_at(TokenCount more, std::int32_t token,
                                       TokenCount context_max) const noexcept;
    // Tokens it may still get.
    TokenCount remaining(TokenCount context_max) const noexcept;

    // Its stay in a slot: what the cache gave the first time, and whether it made progress since.
    void admitted(TokenCount cached) noexcept;
    void retracted() noexcept { ++retractions_; }
    // Its last token is fed again, to a new slot; the rest of it is written.
    void resumed() noexcept { known_at_admission_ = known(); }
    TokenCount cached() const noexcept { return cached_.value_or(TokenCount(0)); }
    bool was_admitted() const noexcept { return cached_.has_value(); }
    std::int32_t retractions() const noexcept { return retractions_; }
    TokenCount known_at_admission() const noexcept { return known_at_admission_; }
    bool progressed() const noexcept { return known() > known_at_admission_; }

    // Whose turn it is; set when it is queued.
    void joins(BranchId branch) noexcept { branch_ = branch; }
    BranchId branch() const noexcept { return branch_; }

  private:
    void hash_full_pages() noexcept;

    Submission wish_;
    Order order_;
    TokenCount page_size_;
    TokenCount prompt_;
    std::vector<std::int32_t> tokens_;
    std::vector<Hash128> hashes_;
    std::optional<TokenCount> cached_;
    TokenCount known_at_admission_;
    std::int32_t retractions_ = 0;
    bool received_ = false;
    bool recomputes_ = false;
    BranchId branch_{0};
};

// A request on its way from state to state: one owner, never absent.
class [[nodiscard]] RequestBox {
  public:
    explicit RequestBox(Submission&& wish, Order order, TokenCount page_size)
        : request_(std::make_unique<Request>(std::move(wish), order, page_size)) {}
    Request* operator->() const noexcept { return request_.get(); }
    const Request& operator*() const noexcept { return *request_; }

  private:
    std::unique_ptr<Request> request_;
};

}  // namespace tokenspeed::control
