// The states of a request. Each owns exactly what it may own, and transitions consume it:
//
//     Queued --admit---> Prefilling --launch--> Stepping --land--> Prefilling | Decoding | Stepping
//     Queued --load----> Loading ---arrive----> Prefilling
//     Queued --receive-> Receiving --arrive---> Prefilling
//     Stepping --extend--> Stepping (overlap)      Stepping --doom--> Doomed --land--> Finished
//     Decoding --park--> Parked --resume--> Prefilling
//     Decoding --send--> Sending --arrive--> Finished
//     Loading, Receiving --cancel--> Cancelled --arrive--> Finished
//     Prefilling, Decoding, Parked --retract--> Queued
//     Queued, Prefilling, Decoding, Parked --finish--> Finished
//
// There is no finish(Stepping) and no finish(Loading): what flies or travels cannot be freed.
// `events.h` holds the whole table.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "hash.h"
#include "pages.h"
#include "prefix_index.h"
#include "room.h"
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
};

// What a request is, whatever its state: its wishes and its tokens, hashed as pages fill.
class Request {
  public:
    Request(Submission&& wish, Order order, TokenCount page_size);

    RequestId id() const noexcept { return wish_.id; }
    Order order() const noexcept { return order_; }
    std::uint64_t salt() const noexcept { return wish_.salt; }
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
    // Its last token is fed again, to a new slot; the rest of it is written.
    void resumed() noexcept { known_at_admission_ = known(); }
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
    bool received_ = false;
    bool recomputes_ = false;
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
    PrefixIndex index;
    SlotPool slots;

    Store(std::span<const GroupConfig> groups, TokenCount page_size, std::int32_t slots_max,
          TokenCount context_max, bool shared)
        : index(groups, page_size, slots_max, context_max, shared), slots(slots_max) {}
};

// --- what states are made of --------------------------------------------------------------------

// The content nodes of a request's full pages, in order.
using Trail = std::vector<NodeRef>;

// One group's pages of a request at rest.
template <class G>
struct Resting {
    std::int32_t first = 0;             // the page that `sealed` begins with; the window's begin
    std::vector<PageRef<G>> sealed;     // of a recurrence: the checkpoint its state begins with
    std::optional<OpenPage<G>> tail;    // written in part; of a recurrence, its state
    std::vector<FreePage<G>> promised;  // for what comes next
};

// A state of a recurrence, copied by a step at the end of a page.
struct Checkpoint {
    std::int32_t index;  // the page it ends with
    InFlight<OpenPage<Recurrent>> page;
};

// One group's pages of a request in flight.
template <class G>
struct Flying {
    std::int32_t first = 0;
    std::vector<PageRef<G>> sealed;
    std::vector<InFlight<OpenPage<G>>> lent;        // continue `sealed`; of a recurrence, its state
    std::vector<InFlight<SealedPage<G>>> replaced;  // by an equal cached page, still being read
    std::vector<FreePage<G>> promised;
    std::vector<Checkpoint> saved;  // of a recurrence
};

// A page on its way from the host.
template <class G>
struct Inbound {
    std::int32_t index;
    InTransit<PageRef<G, Host>> source;
    InTransit<OpenPage<G>> target;
};
template <class G>
struct Loads {
    std::vector<Inbound<G>> pages;  // by index
    std::vector<PageRef<G>> room;   // for the request's pages once all of them are there
};
// Pages that another engine writes, in order.
template <class G>
using Arrivals = std::vector<InTransit<OpenPage<G>>>;
// Pages that another engine reads.
template <class G>
struct Departures {
    std::int32_t first = 0;  // the page that `sealed` begins with
    std::vector<InTransit<PageRef<G>>> sealed;
    std::vector<InTransit<OpenPage<G>>> tail;  // at most one
};

// --- states -------------------------------------------------------------------------------------

// Waits for a slot; owns neither slot nor page.
struct Queued {
    explicit Queued(RequestBox&& box) noexcept : request(std::move(box)) {}
    RequestBox request;
};

// Part of its cached pages are on their way from the host.
struct Loading {
    RequestBox request;
    Slot slot;
    Trail trail;
    PerGroup<Resting> pages;
    PerGroup<Loads> loads;
    TokenCount fed;
};

// Its KV is on its way from another engine.
struct Receiving {
    RequestBox request;
    Slot slot;
    Trail trail;
    PerGroup<Resting> pages;
    PerGroup<Arrivals> arrivals;
};

// Holds a slot and the pages its known tokens need; nothing of it is in flight.
struct Prefilling {
    RequestBox request;
    Slot slot;
    Trail trail;
    PerGroup<Resting> pages;
    TokenCount fed;  // tokens whose KV is written
};

// Every known token but the last is written; nothing of it is in flight.
struct Decoding {
    RequestBox request;
    Slot slot;
    Trail trail;
    PerGroup<Resting> pages;
};

// Lent to launched steps, `last` the latest of them.
struct Stepping {
    RequestBox request;
    Slot slot;
    Trail trail;
    PerGroup<Flying> pages;
    TokenCount fed;      // tokens whose KV is written once all its steps have retired
    TokenCount pending;  // tokens sampled by steps in flight
    StepId last;
};

// Gave its slot to a more urgent one and keeps its pages.
struct Parked {
    RequestBox request;
    Trail trail;
    PerGroup<Resting> pages;
};

// Has its token; another engine reads its pages.
struct Sending {
    RequestId id;
    FinishReason reason;
    Slot slot;
    Trail trail;
    PerGroup<Departures> departures;
};

// Ended while in flight: holds what its last step still uses, and gives it back when that retires.
struct Doomed {
    RequestId id;
    FinishReason reason;
    Slot slot;
    Trail trail;
    PerGroup<Flying> pages;
    StepId last;
};

// Ended while a transfer writes its pages: holds those until the transfer is over.
struct Cancelled {
    RequestId id;
    FinishReason reason;
    Slot slot;
    PerGroup<Loads> loads;
    PerGroup<Arrivals> arrivals;
};

// Owns nothing any more.
struct Finished {
    RequestId id;
    FinishReason reason;
};

template <class... S>
struct States {};
using AllStates = States<Queued, Loading, Receiving, Prefilling, Decoding, Stepping, Parked,
                         Sending, Doomed, Cancelled, Finished>;

// --- admission ----------------------------------------------------------------------------------

// What a ticket promises: cached content, pages in place, pages to come.
struct Grant {
    Trail trail;
    PerGroup<Resting> pages;
    TokenCount cached;  // tokens that need not be computed
};

// The tickets. What one promises is in it, so what it says cannot go stale.

// To begin at once.
class [[nodiscard]] Admission {
  public:
    Admission(Admission&&) noexcept = default;
    Admission& operator=(Admission&&) = delete;

  private:
    friend class Prober;
    friend Prefilling admit(Queued&& queued, Admission&& ticket, Slot&& slot) noexcept;
    friend void cancel(Admission&& ticket, Store& store) noexcept;
    explicit Admission(Grant&& grant) noexcept : grant_(std::move(grant)) {}
    Grant grant_;
};

// To begin once pages that only the host holds are loaded.
class [[nodiscard]] LoadAdmission {
  public:
    LoadAdmission(LoadAdmission&&) noexcept = default;
    LoadAdmission& operator=(LoadAdmission&&) = delete;

  private:
    friend class Prober;
    friend Loading load(Queued&& queued, LoadAdmission&& ticket, Slot&& slot,
                        TransferId transfer) noexcept;
    friend void cancel(LoadAdmission&& ticket, Store& store) noexcept;
    template <class G>
    struct Found {
        std::int32_t index;
        PageRef<G, Host> source;
        FreePage<G> target;
    };
    template <class G>
    using Hosted = std::vector<Found<G>>;
    LoadAdmission(Grant&& grant, PerGroup<Hosted>&& hosted, PerGroup<Loads>&& room) noexcept
        : grant_(std::move(grant)), hosted_(std::move(hosted)), room_(std::move(room)) {}
    Grant grant_;
    PerGroup<Hosted> hosted_;
    PerGroup<Loads> room_;
};

// To begin once another engine has sent what it computed.
class [[nodiscard]] ReceiveAdmission {
  public:
    ReceiveAdmission(ReceiveAdmission&&) noexcept = default;
    ReceiveAdmission& operator=(ReceiveAdmission&&) = delete;

  private:
    friend class Prober;
    friend Receiving receive(Queued&& queued, ReceiveAdmission&& ticket, Slot&& slot,
                             TransferId transfer) noexcept;
    friend void cancel(ReceiveAdmission&& ticket, Store& store) noexcept;
    ReceiveAdmission(Grant&& grant, PerGroup<Arrivals>&& room) noexcept
        : grant_(std::move(grant)), room_(std::move(room)) {}
    Grant grant_;
    PerGroup<Arrivals> room_;
};

// Refused: what each group's cached and missing part need, if they were all unreferenced.
struct Refused {
    PageCounts wanted;
};
using Probed = std::variant<Admission, LoadAdmission, ReceiveAdmission, Refused>;
// Probes the cache for the request and takes what it needs, leaving `reserve` pages to others.
// `chunk_max` tokens are the most that a step feeds: so far ahead a window group is promised pages.
Probed probe(const Queued& queued, PageCount reserve, TokenCount chunk_max, Store& store);

// Gives everything back.
void cancel(Admission&& ticket, Store& store) noexcept;
void cancel(LoadAdmission&& ticket, Store& store) noexcept;
void cancel(ReceiveAdmission&& ticket, Store& store) noexcept;

Prefilling admit(Queued&& queued, Admission&& ticket, Slot&& slot) noexcept;
[[nodiscard]] Loading load(Queued&& queued, LoadAdmission&& ticket, Slot&& slot,
                           TransferId transfer) noexcept;
[[nodiscard]] Receiving receive(Queued&& queued, ReceiveAdmission&& ticket, Slot&& slot,
                                TransferId transfer) noexcept;

// --- launching ----------------------------------------------------------------------------------

// Room made before a launch, so that launching itself cannot fail.
class Berth {
  public:
    // For what a step lends that feeds `chunk` tokens, beside what is lent already.
    Berth(const Prefilling& request, TokenCount chunk);
    explicit Berth(const Decoding& request);
    Berth(const Stepping& request, TokenCount chunk);

  private:
    Berth(const PerGroup<Resting>& pages, std::size_t touched);
    friend Stepping launch(Prefilling&&, StepId, TokenCount, Berth&&) noexcept;
    friend Stepping launch(Decoding&&, StepId, Berth&&) noexcept;
    friend Stepping extend(Stepping&&, StepId, TokenCount, Berth&&) noexcept;
    PerGroup<Flying> room_;
};

// Lends what the step writes: the tail page and the promised pages that `chunk` tokens reach, and
// a page for the state of a recurrence if one was promised and the chunk ends where one is kept.
[[nodiscard]] Stepping launch(Prefilling&& request, StepId step, TokenCount chunk,
                              Berth&& berth) noexcept;
// One token.
[[nodiscard]] Stepping launch(Decoding&& request, StepId step, Berth&& berth) noexcept;
// Overlap: a later step goes on where the one in flight will end.
[[nodiscard]] Stepping extend(Stepping&& request, StepId next, TokenCount chunk,
                              Berth&& berth) noexcept;

// Pages of a group that the request lacks to write its first `end` tokens.
template <class G>
PageCount lacks(const Prefilling& request, TokenCount end) noexcept;
template <class G>
PageCount lacks(const Decoding& request, TokenCount end) noexcept;
template <class G>
PageCount lacks(const Stepping& request, TokenCount end) noexcept;
// Promises it one more, for which there must be room.
template <class G, class State>
void grow(State& request, FreePage<G>&& page) noexcept {
    request.pages.template of<G>().promised.push_back(std::move(page));
}
template <class G, class State>
void reserve_growth(State& request) {
    make_room_for(request.pages.template of<G>().promised, 1);
}

// --- landing ------------------------------------------------------------------------------------

// A cached page took the place of an equal one the request had written.
struct Swap {
    GroupKind group;
    std::int32_t index;
    std::int32_t page;
};

// A step of the request retired, after which `written` tokens have their KV: full pages are
// sealed and shelved, and the request is at rest unless a later step of it is in flight.
using Landed = std::variant<Prefilling, Decoding, Stepping>;
[[nodiscard]] Landed land(Stepping&& request, const Retired& done, TokenCount written, Store& store,
                          std::vector<Swap>& swaps) noexcept;
// Makes the room that `land` needs, so that a failure comes before anything has moved.
void reserve_landing(Stepping& request, std::vector<Swap>& swaps);
using Ended = std::variant<Doomed, Finished>;
[[nodiscard]] Ended land(Doomed&& request, const Retired& done, Store& store) noexcept;

// --- transfers ----------------------------------------------------------------------------------

// Room made, while its last step flies, for a request's pages to depart.
class Manifest {
  public:
    explicit Manifest(const Stepping& request);

  private:
    friend Sending send(Decoding&&, FinishReason, TransferId, Manifest&&, Store&) noexcept;
    PerGroup<Departures> room_;
};
[[nodiscard]] Sending send(Decoding&& request, FinishReason reason, TransferId transfer,
                           Manifest&& manifest, Store& store) noexcept;

// The transfer is over and brought what it should.
[[nodiscard]] Prefilling arrive(Loading&& request, const Arrived& done, Store& store,
                                std::vector<Swap>& swaps) noexcept;
[[nodiscard]] Prefilling arrive(Receiving&& request, const Arrived& done, Store& store,
                                std::vector<Swap>& swaps) noexcept;
[[nodiscard]] Finished arrive(Sending&& request, const Arrived& done, Store& store) noexcept;
[[nodiscard]] Finished arrive(Cancelled&& request, const Arrived& done, Store& store) noexcept;
void reserve_arrival(Loading& request, std::vector<Swap>& swaps);
void reserve_arrival(Receiving& request, std::vector<Swap>& swaps);

// The transfer is over and brought nothing: what it should have brought is computed.
[[nodiscard]] Queued fail(Loading&& request, const Arrived& done, Store& store) noexcept;
[[nodiscard]] Queued fail(Receiving&& request, const Arrived& done, Store& store) noexcept;
[[nodiscard]] Finished fail(Sending&& request, const Arrived& done, Store& store) noexcept;
[[nodiscard]] Finished fail(Cancelled&& request, const Arrived& done, Store& store) noexcept;

// --- giving way ---------------------------------------------------------------------------------

// The slot goes back, the pages stay.
[[nodiscard]] Parked park(Decoding&& request, Store& store) noexcept;
// In a new slot it feeds its last token again, which that slot has never seen.
[[nodiscard]] Prefilling resume(Parked&& request, Slot&& slot) noexcept;

// Back to the queue: tokens kept, sealed pages left to the cache.
[[nodiscard]] Queued retract(Prefilling&& request, Store& store) noexcept;
[[nodiscard]] Queued retract(Decoding&& request, Store& store) noexcept;
[[nodiscard]] Queued retract(Parked&& request, Store& store) noexcept;

// --- leaving ------------------------------------------------------------------------------------

[[nodiscard]] Finished finish(Queued&& request, FinishReason reason) noexcept;
[[nodiscard]] Finished finish(Prefilling&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Finished finish(Decoding&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Finished finish(Parked&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Doomed doom(Stepping&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Cancelled cancel(Loading&& request, FinishReason reason, Store& store) noexcept;
[[nodiscard]] Cancelled cancel(Receiving&& request, FinishReason reason, Store& store) noexcept;

}  // namespace tokenspeed::control
