#include "witness.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "events.h"

#define UNWATCHED __attribute__((no_instrument_function))

namespace tokenspeed::proof {

namespace {

using namespace control;

constexpr std::array kEvents{"Admit", "Load", "Receive", "Arrive",  "Fail", "Launch", "Speculate",
                             "Land",  "Park", "Resume",  "Retract", "Send", "Stop",   "Abort"};
constexpr std::array kStates{"Queued",   "Loading",  "Receiving", "Prefilling",
                             "Decoding", "Stepping", "Verifying", "Parked",
                             "Sending",  "Doomed",   "Cancelled", "Finished"};
constexpr std::size_t kPairs = kEvents.size() * kStates.size();

template <class Wanted, class... T>
constexpr std::size_t index_in(States<T...>) {
    std::size_t index = 0;
    static_cast<void>(((std::is_same_v<Wanted, T> || (++index, false)) || ...));
    return index;
}
template <class Event, class State>
constexpr std::size_t kPair =
    index_in<Event>(AllEvents{}) * kStates.size() + index_in<State>(AllStates{});

// What the table allows, as the compiler has it.
template <class Event, class... S>
constexpr void note_legal(std::array<bool, kPairs>& legal, States<S...>) {
    ((legal[kPair<Event, S>] = !std::is_same_v<table::Verdict<Event, S>, Rejected>), ...);
}
template <class... Event>
constexpr std::array<bool, kPairs> legal_pairs(States<Event...>) {
    static_assert(sizeof...(Event) == kEvents.size());
    std::array<bool, kPairs> legal{};
    (note_legal<Event>(legal, AllStates{}), ...);
    return legal;
}
constexpr std::array<bool, kPairs> kLegal = legal_pairs(AllEvents{});

// The table has these because an abort does the same. But what runs in no step samples nothing, so
// nothing else ends it; a prompt has all its pages, so that only answers fill a pool; and a draft
// is at rest when its samples are known.
constexpr std::array kNoOccasion{kPair<Stop, Loading>, kPair<Stop, Receiving>, kPair<Stop, Parked>,
                                 kPair<Stop, Prefilling>, kPair<Stop, Verifying>};

// Functions by address, in a table of open addressing; what is not there is of no interest.
struct Watched {
    const void* function = nullptr;
    std::size_t pair = 0;
};
constexpr std::size_t kPlaces = 256;
using Table = std::array<Watched, kPlaces>;

UNWATCHED std::size_t place_of(const Table& table, const void* function) noexcept {
    std::size_t place = (reinterpret_cast<std::uintptr_t>(function) >> 4) % kPlaces;
    while (table[place].function != nullptr && table[place].function != function) {
        place = (place + 1) % kPlaces;
    }
    return place;
}

// A transition, picked from its overloads by its whole signature.
template <class Next, class... Parameters>
struct Picked {
    const void* address;
    explicit Picked(Next (*function)(Parameters...) noexcept)
        : address(reinterpret_cast<const void*>(function)) {}
};

UNWATCHED Table make_table() {
    Table table;
    const auto add = [&]<class Event, class State>(const auto& picked) {
        table[place_of(table, picked.address)] = {picked.address, kPair<Event, State>};
    };
    const auto stop = [&]<class State, class Next>() {
        if constexpr (std::is_same_v<State, Queued>) {
            add.operator()<Stop, State>(Picked<Next, State&&, FinishReason>(&finish));
        } else if constexpr (std::is_same_v<Next, Finished>) {
            add.operator()<Stop, State>(Picked<Next, State&&, FinishReason, Store&>(&finish));
        } else if constexpr (std::is_same_v<Next, Doomed>) {
            add.operator()<Stop, State>(Picked<Next, State&&, FinishReason, Store&>(&doom));
        } else {
            add.operator()<Stop, State>(Picked<Next, State&&, FinishReason, Store&>(&cancel));
        }
        add.operator()<Abort, State>(Picked<Next, Abort, State&&, Store&>(&on));
    };
    stop.operator()<Queued, Finished>();
    stop.operator()<Loading, Cancelled>();
    stop.operator()<Receiving, Cancelled>();
    stop.operator()<Prefilling, Finished>();
    stop.operator()<Decoding, Finished>();
    stop.operator()<Stepping, Doomed>();
    stop.operator()<Verifying, Doomed>();
    stop.operator()<Parked, Finished>();
    add.operator()<Abort, Sending>(Picked<Sending, Abort, Sending&&, Store&>(&on));
    add.operator()<Abort, Doomed>(Picked<Doomed, Abort, Doomed&&, Store&>(&on));
    add.operator()<Abort, Cancelled>(Picked<Cancelled, Abort, Cancelled&&, Store&>(&on));

    add.operator()<Admit, Queued>(Picked<Prefilling, Queued&&, Admission&&, Slot&&>(&admit));
    add.operator()<Load, Queued>(
        Picked<Loading, Queued&&, LoadAdmission&&, Slot&&, TransferId>(&load));
    add.operator()<Receive, Queued>(
        Picked<Receiving, Queued&&, ReceiveAdmission&&, Slot&&, TransferId>(&receive));

    using Swaps = std::vector<Swap>&;
    add.operator()<Arrive, Loading>(
        Picked<Prefilling, Loading&&, const Arrived&, Store&, Swaps>(&arrive));
    add.operator()<Arrive, Receiving>(
        Picked<Prefilling, Receiving&&, const Arrived&, Store&, Swaps>(&arrive));
    add.operator()<Arrive, Sending>(Picked<Finished, Sending&&, const Arrived&, Store&>(&arrive));
    add.operator()<Arrive, Cancelled>(
        Picked<Finished, Cancelled&&, const Arrived&, Store&>(&arrive));
    add.operator()<Fail, Loading>(Picked<Queued, Loading&&, const Arrived&, Store&>(&fail));
    add.operator()<Fail, Receiving>(Picked<Queued, Receiving&&, const Arrived&, Store&>(&fail));
    add.operator()<Fail, Sending>(Picked<Finished, Sending&&, const Arrived&, Store&>(&fail));
    add.operator()<Fail, Cancelled>(Picked<Finished, Cancelled&&, const Arrived&, Store&>(&fail));

    add.operator()<Launch, Prefilling>(
        Picked<Stepping, Prefilling&&, StepId, TokenCount, Berth&&>(&launch));
    add.operator()<Launch, Decoding>(Picked<Stepping, Decoding&&, StepId, Berth&&>(&launch));
    add.operator()<Launch, Stepping>(
        Picked<Stepping, Stepping&&, StepId, TokenCount, Berth&&>(&extend));
    add.operator()<Land, Stepping>(
        Picked<Landed, Stepping&&, const Retired&, TokenCount, Store&, Swaps>(&land));
    add.operator()<Speculate, Decoding>(Picked<Verifying, Decoding&&, StepId, Draft&&>(&speculate));
    add.operator()<Land, Verifying>(
        Picked<Decoding, Verifying&&, const Retired&, const Verified&, Store&, Swaps>(&land));
    add.operator()<Land, Doomed>(Picked<Ended, Doomed&&, const Retired&, Store&>(&land));

    add.operator()<Park, Decoding>(Picked<Parked, Decoding&&, Store&>(&park));
    add.operator()<Resume, Parked>(Picked<Prefilling, Parked&&, Slot&&>(&resume));
    add.operator()<Retract, Prefilling>(Picked<Queued, Prefilling&&, Store&>(&retract));
    add.operator()<Retract, Decoding>(Picked<Queued, Decoding&&, Store&>(&retract));
    add.operator()<Retract, Parked>(Picked<Queued, Parked&&, Store&>(&retract));
    add.operator()<Send, Decoding>(
        Picked<Sending, Decoding&&, FinishReason, TransferId, Manifest&&, Store&>(&send));
    return table;
}

const Table kTable = make_table();
std::array<std::atomic<bool>, kPairs> performed{};
std::atomic<bool> called = false;
// Transitions that an abort consists of are no stops.
thread_local int aborts_open = 0;

UNWATCHED bool aborts(std::size_t pair) noexcept {
    return pair / kStates.size() == index_in<Abort>(AllEvents{});
}
UNWATCHED void entered(const void* function) noexcept {
    const Watched& found = kTable[place_of(kTable, function)];
    if (found.function == nullptr) return;
    if (aborts_open == 0) performed[found.pair].store(true, std::memory_order_relaxed);
    if (aborts(found.pair)) ++aborts_open;
    called.store(true, std::memory_order_relaxed);
}
UNWATCHED void left(const void* function) noexcept {
    const Watched& found = kTable[place_of(kTable, function)];
    if (found.function != nullptr && aborts(found.pair)) --aborts_open;
}

}  // namespace

bool watching() noexcept {
    return called;
}

void witness_late_abort() noexcept {
    performed[kPair<Abort, Finished>] = true;
}

Pairs pairs() {
    Pairs found;
    for (std::size_t pair = 0; pair < kPairs; ++pair) {
        const std::string name =
            std::string(kEvents[pair / kStates.size()]) + " x " + kStates[pair % kStates.size()];
        const bool occasion =
            kLegal[pair] && std::ranges::find(kNoOccasion, pair) == kNoOccasion.end();
        if (!occasion && performed[pair]) found.wrong.push_back(name);
        if (!occasion) continue;
        ++found.legal;
        if (performed[pair]) {
            ++found.reached;
        } else {
            found.missing.push_back(name);
        }
    }
    return found;
}

}  // namespace tokenspeed::proof

extern "C" {
UNWATCHED void __cyg_profile_func_enter(void* function, void*) {
    tokenspeed::proof::entered(function);
}
UNWATCHED void __cyg_profile_func_exit(void* function, void*) {
    tokenspeed::proof::left(function);
}
}
