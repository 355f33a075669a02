// The states of a request. Each owns exactly what it may own, and transitions consume it:
//
//     Queued --admit---> Prefilling --launch--> Stepping --land--> Prefilling | Decoding | Stepping
//     Queued --load----> Loading ---arrive----> Prefilling
//     Queued --receive-> Receiving --arrive---> Prefilling
//     Stepping --extend--> Stepping (overlap)      Stepping --doom--> Doomed --land--> Finished
//     Decoding --speculate--> Verifying --land--> Decoding     Verifying --doom--> Doomed
//     Decoding --park--> Parked --resume--> Prefilling
//     Decoding --send--> Sending --arrive--> Finished
//     Loading, Receiving --cancel--> Cancelled --arrive--> Finished
//     Prefilling, Decoding, Parked --retract--> Queued
//     Queued, Prefilling, Decoding, Parked --finish--> Finished
//
// There is no finish(Stepping) and no finish(Loading): what flies or travels cannot be freed. There
// is no extend(Verifying): nobody knows where its draft will end.
// `events.h` holds the whole table.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "pages.h"
#include "prefix_index.h"
#include "proposals.h"
#include "requests.h"
#include "slots.h"

namespace tokenspeed::control {

// Everything that pages and slots go back to.
struct Store {
    PrefixIndex index;
    SlotPool slots;

    Store(std::span<const GroupConfig> groups, TokenCount page_size, std::int32_t slots_max,
          TokenCount context_max, bool shared, CachePolicy policy)
        : index(groups, page_size, slots_max, context_max, shared, policy), slots(slots_max) {}
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

// One group's pages that a draft reaches, in flight; they continue the sealed ones.
template <class G>
using Guessed = std::vector<InFlight<DraftPage<G>>>;

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
    Proposal proposal = {};  // of what comes after its last token
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
    bool proposes = false;  // its last step brings a proposal, so that it goes on at rest only
};

// Lent to a launched step that feeds its last token and a draft: guesses of what comes after it.
struct Verifying {
    RequestBox request;
    Slot slot;
    Trail trail;
    PerGroup<Resting> pages;  // what the draft does not reach; no tail
    PerGroup<Guessed> guesses;
    std::vector<std::int32_t> draft;  // at least one
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
    PerGroup<Guessed> guesses;  // of one that was verifying
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
using AllStates = States<Queued, Loading, Receiving, Prefilling, Decoding, Stepping, Verifying,
                         Parked, Sending, Doomed, Cancelled, Finished>;

}  // namespace tokenspeed::control
