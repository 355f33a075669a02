// The table: what every event does to every state, complete or it does not compile.
//
// Each line below is one (event, state) pair; no line catches two. `Next` names the states the
// event leads to, `Ignored` leaves the state as it is, and `Rejected` means that no code exists to
// do it, which the end of this page makes the compiler check in both directions.
#pragma once

#include <type_traits>
#include <utility>

#include "requests.h"

namespace tokenspeed::control {

// --- events ---
struct Admit {};    // a ticket and a slot are at hand
struct Launch {};   // a planned step takes the request along
struct Land {};     // a step that carried it has retired
struct Retract {};  // its pages are needed elsewhere
struct Stop {};     // its last token came, or it can never fit
struct Abort {};    // the client ended it: the one event that comes from outside, by id

// --- verdicts ---
template <class... S>
struct Next {};
struct Ignored {};
struct Rejected {};

// clang-format off
Next<Prefilling>                     verdict(Admit,   const Queued&);
Rejected                             verdict(Admit,   const Prefilling&);
Rejected                             verdict(Admit,   const Decoding&);
Rejected                             verdict(Admit,   const Stepping&);
Rejected                             verdict(Admit,   const Doomed&);
Rejected                             verdict(Admit,   const Finished&);

Rejected                             verdict(Launch,  const Queued&);
Next<Stepping>                       verdict(Launch,  const Prefilling&);
Next<Stepping>                       verdict(Launch,  const Decoding&);
Next<Stepping>                       verdict(Launch,  const Stepping&);
Rejected                             verdict(Launch,  const Doomed&);
Rejected                             verdict(Launch,  const Finished&);

Rejected                             verdict(Land,    const Queued&);
Rejected                             verdict(Land,    const Prefilling&);
Rejected                             verdict(Land,    const Decoding&);
Next<Prefilling, Decoding, Stepping> verdict(Land,    const Stepping&);
Next<Doomed, Finished>               verdict(Land,    const Doomed&);
Rejected                             verdict(Land,    const Finished&);

Rejected                             verdict(Retract, const Queued&);
Next<Queued>                         verdict(Retract, const Prefilling&);
Next<Queued>                         verdict(Retract, const Decoding&);
Rejected                             verdict(Retract, const Stepping&);
Rejected                             verdict(Retract, const Doomed&);
Rejected                             verdict(Retract, const Finished&);

Next<Finished>                       verdict(Stop,    const Queued&);
Next<Finished>                       verdict(Stop,    const Prefilling&);
Next<Finished>                       verdict(Stop,    const Decoding&);
Next<Doomed>                         verdict(Stop,    const Stepping&);
Rejected                             verdict(Stop,    const Doomed&);
Rejected                             verdict(Stop,    const Finished&);

Next<Finished>                       verdict(Abort,   const Queued&);
Next<Finished>                       verdict(Abort,   const Prefilling&);
Next<Finished>                       verdict(Abort,   const Decoding&);
Next<Doomed>                         verdict(Abort,   const Stepping&);
Ignored                              verdict(Abort,   const Doomed&);
Ignored                              verdict(Abort,   const Finished&);
// clang-format on

// --- what an event from outside does; one overload for each state it can find ---

inline Finished on(Abort, Queued&& request, Store&) noexcept {
    return finish(std::move(request), FinishReason::kAbort);
}
inline Finished on(Abort, Prefilling&& request, Store& store) noexcept {
    return finish(std::move(request), FinishReason::kAbort, store);
}
inline Finished on(Abort, Decoding&& request, Store& store) noexcept {
    return finish(std::move(request), FinishReason::kAbort, store);
}
inline Doomed on(Abort, Stepping&& request, Store& store) noexcept {
    return doom(std::move(request), FinishReason::kAbort, store);
}
// Its terminal event is out already.
inline Doomed on(Abort, Doomed&& request, Store&) noexcept {
    return std::move(request);
}
inline Finished on(Abort, Finished&& request, Store&) noexcept {
    return request;
}

// --- the proof that table and code agree ---

namespace table {

template <class Event, class State>
using Verdict = decltype(verdict(std::declval<Event>(), std::declval<const State&>()));

template <class Event, class State>
concept Answered = requires { typename Verdict<Event, State>; };

// The type of the transition that performs an event on a state; nothing where no code does it.
template <class Event, class State>
struct Performed {
    using type = Rejected;
};
template <class State>
    requires requires(State s, Admission a, Slot t) {
        admit(std::move(s), std::move(a), std::move(t));
    }
struct Performed<Admit, State> {
    using type =
        decltype(admit(std::declval<State>(), std::declval<Admission>(), std::declval<Slot>()));
};
template <class State>
    requires requires(State s, Berth b) {
        launch(std::move(s), StepId(0), TokenCount(1), std::move(b));
    }
struct Performed<Launch, State> {
    using type =
        decltype(launch(std::declval<State>(), StepId(0), TokenCount(1), std::declval<Berth>()));
};
template <class State>
    requires requires(State s, Berth b) { launch(std::move(s), StepId(0), std::move(b)); }
struct Performed<Launch, State> {
    using type = decltype(launch(std::declval<State>(), StepId(0), std::declval<Berth>()));
};
template <class State>
    requires requires(State s, Berth b) {
        extend(std::move(s), StepId(0), TokenCount(1), std::move(b));
    }
struct Performed<Launch, State> {
    using type =
        decltype(extend(std::declval<State>(), StepId(0), TokenCount(1), std::declval<Berth>()));
};
template <class State>
    requires requires(State s, const Retired& d, Store& p, std::vector<Swap>& w) {
        land(std::move(s), d, TokenCount(0), p, w);
    }
struct Performed<Land, State> {
    using type = decltype(land(std::declval<State>(), std::declval<const Retired&>(), TokenCount(0),
                               std::declval<Store&>(), std::declval<std::vector<Swap>&>()));
};
template <class State>
    requires requires(State s, const Retired& d, Store& p) { land(std::move(s), d, p); }
struct Performed<Land, State> {
    using type = decltype(land(std::declval<State>(), std::declval<const Retired&>(),
                               std::declval<Store&>()));
};
template <class State>
    requires requires(State s, Store& p) { retract(std::move(s), p); }
struct Performed<Retract, State> {
    using type = decltype(retract(std::declval<State>(), std::declval<Store&>()));
};
template <class State>
    requires requires(State s) { finish(std::move(s), FinishReason::kStop); }
struct Performed<Stop, State> {
    using type = decltype(finish(std::declval<State>(), FinishReason::kStop));
};
template <class State>
    requires requires(State s, Store& p) { finish(std::move(s), FinishReason::kStop, p); }
struct Performed<Stop, State> {
    using type =
        decltype(finish(std::declval<State>(), FinishReason::kStop, std::declval<Store&>()));
};
template <class State>
    requires requires(State s, Store& p) { doom(std::move(s), FinishReason::kStop, p); }
struct Performed<Stop, State> {
    using type = decltype(doom(std::declval<State>(), FinishReason::kStop, std::declval<Store&>()));
};
template <class State>
    requires requires(State s, Store& p) { on(Abort{}, std::move(s), p); }
struct Performed<Abort, State> {
    using type = decltype(on(Abort{}, std::declval<State>(), std::declval<Store&>()));
};

// A verdict allows a transition of exactly its states.
template <class Verdict, class State, class Type>
inline constexpr bool allows = false;
template <class State>
inline constexpr bool allows<Rejected, State, Rejected> = true;
template <class State>
inline constexpr bool allows<Ignored, State, State> = true;
template <class S, class State>
inline constexpr bool allows<Next<S>, State, S> = true;
template <class... S, class State>
inline constexpr bool allows<Next<S...>, State, std::variant<S...>> = sizeof...(S) > 1;

template <class Event, class State>
consteval bool settled() {
    static_assert(Answered<Event, State>,
                  "an event does not answer for a state: add the pair to the table in events.h");
    if constexpr (Answered<Event, State>) {
        static_assert(allows<Verdict<Event, State>, State, typename Performed<Event, State>::type>,
                      "the table in events.h and the transitions disagree about a pair");
    }
    return true;
}

template <class Event, class... S>
consteval bool total(States<S...>) {
    return (settled<Event, S>() && ...);
}

static_assert(total<Admit>(AllStates{}) && total<Launch>(AllStates{}) && total<Land>(AllStates{}) &&
              total<Retract>(AllStates{}) && total<Stop>(AllStates{}) && total<Abort>(AllStates{}));

}  // namespace table

}  // namespace tokenspeed::control
