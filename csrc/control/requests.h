// The states of a request. Each owns exactly what it may own, and transitions consume it:
//
//     Queued --admit--> Prefilling --launch--> Stepping --land--> Prefilling | Decoding | Stepping
//       ^                   |                  |  ^ |                           |
//       +----- retract -----+                  |  +-+ extend (overlap)          |
//       +----- retract ---------- Decoding <---|--------------------------------+
//                                    |         +--doom--> Doomed --land--> Finished
//     Queued, Prefilling, Decoding --finish--> Finished
//
// There is no finish(Stepping): what flies cannot be freed. `events.h` holds the whole table.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "hash.h"
#include "pages.h"
#include "prefix_index.h"
#include "slots.h"

namespace tokenspeed::control {

// The numbers are core.step.FinishReason's.
enum class FinishReason : std::int32_t { kStop = 1, kLength = 2, kAbort = 3, kRejected = 4 };

// Priority first (lower is more urgent), then arrival.
struct Order {
    std::int32_t priority;
    std::int64_t arrival;
    friend auto operator<=>(const Order&, const Order&) = default;
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
};

// What a request is, whatever its state: its wishes and its tokens, hashed as pages fill.
class Request {
  public:
    Request(Submission&& wish, Order order, TokenCount page_size);

    RequestId id() const noexcept { return wish_.id; }
    Order order() const noexcept { return order_; }
    std::uint64_t salt() const noexcept { return wish_.salt; }
    TokenCount page_size() const noexcept { return page_size_; }

    const std::vector<std::int32_t>& tokens() const noexcept { return tokens_; }
    const std::vector<Hash128>& hashes() const noexcept { return hashes_; }
    TokenCount known() const noexcept {
        return TokenCount(static_cast<std::int32_t>(tokens_.size()));
    }
    TokenCount outputs() const noexcept { return known() - prompt_; }
    PageContent page(std::size_t index) const noexcept;

    // Makes room for one more token, so that `append` cannot fail.
    void reserve_token();
    void append(std::int32_t token) noexcept;

    // Whether `pending` sampled tokens in flight already bring the request to its end.
    bool exhausted(TokenCount pending, TokenCount context_max) const noexcept;
    // Whether the last token ends the request.
    std::optional<FinishReason> end(TokenCount context_max) const noexcept;

    // Its stay in a slot: what the cache gave the first time, and whether it made progress since.
    void admitted(TokenCount cached) noexcept;
    void retracted() noexcept { ++retractions_; }
    TokenCount cached() const noexcept { return cached_.value_or(TokenCount(0)); }
    bool was_admitted() const noexcept { return cached_.has_value(); }
    std::int32_t retractions() const noexcept { return retractions_; }
    TokenCount known_at_admission() const noexcept { return known_at_admission_; }
    bool progressed() const noexcept { return known() > known_at_admission_; }

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

// Everything that pages and slots go back to.
struct Store {
    PagePool pages;
    PrefixIndex index;
    SlotPool slots;

    Store(PageCount page_count, TokenCount page_size, std::int32_t slot_count, bool shared)
        : pages(page_count), index(pages, page_size, shared), slots(slot_count) {}

    PageCount available() const noexcept { return pages.free_count() + index.cached_count(); }
    // A free page, evicting for it if need be.
    [[nodiscard]] std::optional<FreePage> take() {
        if (pages.free_count() == PageCount(0)) index.evict();
        return pages.take();
    }
};

// --- states -------------------------------------------------------------------------------------

// Waits for a slot; owns neither slot nor page.
struct Queued {
    explicit Queued(RequestBox&& box) noexcept : request(std::move(box)) {}
    RequestBox request;
};

// Holds a slot and the pages its known tokens need; nothing of it is in flight.
struct Prefilling {
    RequestBox request;
    Slot slot;
    std::vector<PageRef> sealed;
    std::optional<OpenPage> tail;    // written in part
    std::vector<FreePage> promised;  // by its admission, last to be used first
    TokenCount fed;                  // tokens whose KV is written
};

// Every known token but the last is written; nothing of it is in flight.
struct Decoding {
    RequestBox request;
    Slot slot;
    std::vector<PageRef> sealed;
    std::optional<OpenPage> tail;  // room for the next token, absent at the end of a page
};

// Lent to launched steps, `last` the latest of them.
struct Stepping {
    RequestBox request;
    Slot slot;
    std::vector<PageRef> sealed;
    std::vector<InFlight<OpenPage>> lent;        // continue `sealed`, in order
    std::vector<InFlight<SealedPage>> replaced;  // by an equal cached page, still being read
    std::vector<FreePage> promised;
    std::optional<FreePage> spare;  // for the next token, once its page is known to be needed
    TokenCount fed;                 // tokens whose KV is written once all its steps have retired
    TokenCount pending;             // tokens sampled by steps in flight
    StepId last;
};

// Ended while in flight: holds what its last step still uses, and gives it back when that retires.
struct Doomed {
    RequestId id;
    FinishReason reason;
    Slot slot;
    std::vector<PageRef> sealed;
    std::vector<InFlight<OpenPage>> lent;
    std::vector<InFlight<SealedPage>> replaced;
    StepId last;
};

// Owns nothing any more.
struct Finished {
    RequestId id;
    FinishReason reason;
};

template <class... S>
struct States {};
using AllStates = States<Queued, Prefilling, Decoding, Stepping, Doomed, Finished>;

// --- transitions --------------------------------------------------------------------------------

// A ticket: the pages it promises are in it, so what it says cannot go stale.
class [[nodiscard]] Admission {
  public:
    Admission(Admission&&) noexcept = default;
    Admission& operator=(Admission&&) = delete;

    // Refused: what the cache's part and the missing part need, if they were all unreferenced.
    struct Refused {
        PageCount wanted;
    };
    // Probes the cache for the request and takes what it needs, leaving `reserve` pages to others.
    static std::variant<Admission, Refused> probe(const Queued& queued, PageCount reserve,
                                                  Store& store);

    // Gives everything back.
    static void cancel(Admission&& ticket, Store& store) noexcept;

  private:
    friend Prefilling admit(Queued&& queued, Admission&& ticket, Slot&& slot) noexcept;
    Admission() = default;
    std::vector<PageRef> cached_;
    std::vector<FreePage> promised_;
};

// Room made before a launch, so that launching itself cannot fail.
class Berth {
  public:
    explicit Berth(std::size_t pages) { lent_.reserve(pages); }

  private:
    friend Stepping launch(Prefilling&&, StepId, TokenCount, Berth&&) noexcept;
    friend Stepping launch(Decoding&&, StepId, Berth&&) noexcept;
    friend Stepping extend(Stepping&&, StepId, TokenCount, Berth&&) noexcept;
    std::vector<InFlight<OpenPage>> lent_;
};

// A cached page took the place of an equal one the request had written.
struct Swap {
    std::int32_t index;
    PageId page;
};

Prefilling admit(Queued&& queued, Admission&& ticket, Slot&& slot) noexcept;

// Lends what the step writes: the tail page and the promised pages that `chunk` tokens reach.
[[nodiscard]] Stepping launch(Prefilling&& request, StepId step, TokenCount chunk,
                              Berth&& berth) noexcept;
// One token; the tail must be there (see `grow`).
[[nodiscard]] Stepping launch(Decoding&& request, StepId step, Berth&& berth) noexcept;
// Overlap: a later step goes on where the one in flight will end.
[[nodiscard]] Stepping extend(Stepping&& request, StepId next, TokenCount chunk,
                              Berth&& berth) noexcept;

// Whether the request's next token has no page to go to, and the page that cures it.
bool needs_page(const Decoding& request) noexcept;
bool needs_page(const Stepping& request) noexcept;
void grow(Decoding& request, FreePage&& page) noexcept;
void grow(Stepping& request, FreePage&& page) noexcept;

// A step of the request retired, after which `written` tokens have their KV: full pages are
// sealed and shelved, and the request is at rest unless a later step of it is in flight.
using Landed = std::variant<Prefilling, Decoding, Stepping>;
[[nodiscard]] Landed land(Stepping&& request, const Retired& done, TokenCount written, Store& store,
                          std::vector<Swap>& swaps);
// Makes the room that `land` needs, so that a failure comes before anything has moved.
void reserve_landing(Stepping& request, std::vector<Swap>& swaps);
using Ended = std::variant<Doomed, Finished>;
[[nodiscard]] Ended land(Doomed&& request, const Retired& done, Store& store) noexcept;

// Back to the queue: tokens kept, sealed pages left to the cache.
[[nodiscard]] Queued retract(Prefilling&& request, Store& store) noexcept;
[[nodiscard]] Queued retract(Decoding&& request, Store& store) noexcept;

[[nodiscard]] Finished finish(Queued&& request, FinishReason reason) noexcept;
[[nodiscard]] Finished finish(Prefilling&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Finished finish(Decoding&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Doomed doom(Stepping&& request, FinishReason reason, Store& store) noexcept;

}  // namespace tokenspeed::control
