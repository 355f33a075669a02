// The table: what every event does to every state, complete or it does not compile.
//
// Each line below is one (event, state) pair; no line catches two. `Next` names the states the
// event leads to, `Ignored` leaves the state as it is, and `Rejected` means that no code exists to
// do it, which the end of this page makes the compiler check in both directions.
#pragma once

#include <type_traits>
#include <utility>

#include "admission.h"
#include "transitions.h"

namespace tokenspeed::control {

// --- events ---
struct Admit {};      // a ticket and a slot are at hand
struct Load {};       // the same, but part of the pages must come from the host
struct Receive {};    // the same, but the pages come from another engine
struct Arrive {};     // its transfer is over: an event from outside, by the transfer's number
struct Fail {};       // its transfer is over and brought nothing: from outside as well
struct Launch {};     // a planned step takes the request along
struct Speculate {};  // a planned step takes it along with a draft
struct Land {};       // a step that carried it has retired
struct Park {};       // its slot is needed elsewhere
struct Resume {};     // a slot is at hand
struct Retract {};    // its pages are needed elsewhere
struct Send {};       // it has its token, and its pages are wanted by another engine
struct Stop {};       // its last token came, or it can never fit
struct Abort {};      // the client ended it: an event from outside, by the request's id
using AllEvents = States<Admit, Load, Receive, Arrive, Fail, Launch, Speculate, Land, Park, Resume,
                         Retract, Send, Stop, Abort>;

// --- verdicts ---
template <class... S>
struct Next {};
struct Ignored {};
struct Rejected {};

// clang-format off
Next<Prefilling>                     verdict(Admit,   const Queued&);
Rejected                             verdict(Admit,   const Loading&);
Rejected                             verdict(Admit,   const Receiving&);
Rejected                             verdict(Admit,   const Prefilling&);
Rejected                             verdict(Admit,   const Decoding&);
Rejected                             verdict(Admit,   const Stepping&);
Rejected                             verdict(Admit,   const Verifying&);
Rejected                             verdict(Admit,   const Parked&);
Rejected                             verdict(Admit,   const Sending&);
Rejected                             verdict(Admit,   const Doomed&);
Rejected                             verdict(Admit,   const Cancelled&);
Rejected                             verdict(Admit,   const Finished&);

Next<Loading>                        verdict(Load,    const Queued&);
Rejected                             verdict(Load,    const Loading&);
Rejected                             verdict(Load,    const Receiving&);
Rejected                             verdict(Load,    const Prefilling&);
Rejected                             verdict(Load,    const Decoding&);
Rejected                             verdict(Load,    const Stepping&);
Rejected                             verdict(Load,    const Verifying&);
Rejected                             verdict(Load,    const Parked&);
Rejected                             verdict(Load,    const Sending&);
Rejected                             verdict(Load,    const Doomed&);
Rejected                             verdict(Load,    const Cancelled&);
Rejected                             verdict(Load,    const Finished&);

Next<Receiving>                      verdict(Receive, const Queued&);
Rejected                             verdict(Receive, const Loading&);
Rejected                             verdict(Receive, const Receiving&);
Rejected                             verdict(Receive, const Prefilling&);
Rejected                             verdict(Receive, const Decoding&);
Rejected                             verdict(Receive, const Stepping&);
Rejected                             verdict(Receive, const Verifying&);
Rejected                             verdict(Receive, const Parked&);
Rejected                             verdict(Receive, const Sending&);
Rejected                             verdict(Receive, const Doomed&);
Rejected                             verdict(Receive, const Cancelled&);
Rejected                             verdict(Receive, const Finished&);

Rejected                             verdict(Arrive,  const Queued&);
Next<Prefilling>                     verdict(Arrive,  const Loading&);
Next<Prefilling>                     verdict(Arrive,  const Receiving&);
Rejected                             verdict(Arrive,  const Prefilling&);
Rejected                             verdict(Arrive,  const Decoding&);
Rejected                             verdict(Arrive,  const Stepping&);
Rejected                             verdict(Arrive,  const Verifying&);
Rejected                             verdict(Arrive,  const Parked&);
Next<Finished>                       verdict(Arrive,  const Sending&);
Rejected                             verdict(Arrive,  const Doomed&);
Next<Finished>                       verdict(Arrive,  const Cancelled&);
Rejected                             verdict(Arrive,  const Finished&);

Rejected                             verdict(Fail,    const Queued&);
Next<Queued>                         verdict(Fail,    const Loading&);
Next<Queued>                         verdict(Fail,    const Receiving&);
Rejected                             verdict(Fail,    const Prefilling&);
Rejected                             verdict(Fail,    const Decoding&);
Rejected                             verdict(Fail,    const Stepping&);
Rejected                             verdict(Fail,    const Verifying&);
Rejected                             verdict(Fail,    const Parked&);
Next<Finished>                       verdict(Fail,    const Sending&);
Rejected                             verdict(Fail,    const Doomed&);
Next<Finished>                       verdict(Fail,    const Cancelled&);
Rejected                             verdict(Fail,    const Finished&);

Rejected                             verdict(Launch,  const Queued&);
Rejected                             verdict(Launch,  const Loading&);
Rejected                             verdict(Launch,  const Receiving&);
Next<Stepping>                       verdict(Launch,  const Prefilling&);
Next<Stepping>                       verdict(Launch,  const Decoding&);
Next<Stepping>                       verdict(Launch,  const Stepping&);
Rejected                             verdict(Launch,  const Verifying&);
Rejected                             verdict(Launch,  const Parked&);
Rejected                             verdict(Launch,  const Sending&);
Rejected                             verdict(Launch,  const Doomed&);
Rejected                             verdict(Launch,  const Cancelled&);
Rejected                             verdict(Launch,  const Finished&);

Rejected                             verdict(Speculate, const Queued&);
Rejected                             verdict(Speculate, const Loading&);
Rejected                             verdict(Speculate, const Receiving&);
Rejected                             verdict(Speculate, const Prefilling&);
Next<Verifying>                      verdict(Speculate, const Decoding&);
Rejected                             verdict(Speculate, const Stepping&);
Rejected                             verdict(Speculate, const Verifying&);
Rejected                             verdict(Speculate, const Parked&);
Rejected                             verdict(Speculate, const Sending&);
Rejected                             verdict(Speculate, const Doomed&);
Rejected                             verdict(Speculate, const Cancelled&);
Rejected                             verdict(Speculate, const Finished&);

Rejected                             verdict(Land,    const Queued&);
Rejected                             verdict(Land,    const Loading&);
Rejected                             verdict(Land,    const Receiving&);
Rejected                             verdict(Land,    const Prefilling&);
Rejected                             verdict(Land,    const Decoding&);
Next<Prefilling, Decoding, Stepping> verdict(Land,    const Stepping&);
Next<Decoding>                       verdict(Land,    const Verifying&);
Rejected                             verdict(Land,    const Parked&);
Rejected                             verdict(Land,    const Sending&);
Next<Doomed, Finished>               verdict(Land,    const Doomed&);
Rejected                             verdict(Land,    const Cancelled&);
Rejected                             verdict(Land,    const Finished&);

Rejected                             verdict(Park,    const Queued&);
Rejected                             verdict(Park,    const Loading&);
Rejected                             verdict(Park,    const Receiving&);
Rejected                             verdict(Park,    const Prefilling&);
Next<Parked>                         verdict(Park,    const Decoding&);
Rejected                             verdict(Park,    const Stepping&);
Rejected                             verdict(Park,    const Verifying&);
Rejected                             verdict(Park,    const Parked&);
Rejected                             verdict(Park,    const Sending&);
Rejected                             verdict(Park,    const Doomed&);
Rejected                             verdict(Park,    const Cancelled&);
Rejected                             verdict(Park,    const Finished&);

Rejected                             verdict(Resume,  const Queued&);
Rejected                             verdict(Resume,  const Loading&);
Rejected                             verdict(Resume,  const Receiving&);
Rejected                             verdict(Resume,  const Prefilling&);
Rejected                             verdict(Resume,  const Decoding&);
Rejected                             verdict(Resume,  const Stepping&);
Rejected                             verdict(Resume,  const Verifying&);
Next<Prefilling>                     verdict(Resume,  const Parked&);
Rejected                             verdict(Resume,  const Sending&);
Rejected                             verdict(Resume,  const Doomed&);
Rejected                             verdict(Resume,  const Cancelled&);
Rejected                             verdict(Resume,  const Finished&);

Rejected                             verdict(Retract, const Queued&);
Rejected                             verdict(Retract, const Loading&);
Rejected                             verdict(Retract, const Receiving&);
Next<Queued>                         verdict(Retract, const Prefilling&);
Next<Queued>                         verdict(Retract, const Decoding&);
Rejected                             verdict(Retract, const Stepping&);
Rejected                             verdict(Retract, const Verifying&);
Next<Queued>                         verdict(Retract, const Parked&);
Rejected                             verdict(Retract, const Sending&);
Rejected                             verdict(Retract, const Doomed&);
Rejected                             verdict(Retract, const Cancelled&);
Rejected                             verdict(Retract, const Finished&);

Rejected                             verdict(Send,    const Queued&);
Rejected                             verdict(Send,    const Loading&);
Rejected                             verdict(Send,    const Receiving&);
Rejected                             verdict(Send,    const Prefilling&);
Next<Sending>                        verdict(Send,    const Decoding&);
Rejected                             verdict(Send,    const Stepping&);
Rejected                             verdict(Send,    const Verifying&);
Rejected                             verdict(Send,    const Parked&);
Rejected                             verdict(Send,    const Sending&);
Rejected                             verdict(Send,    const Doomed&);
Rejected                             verdict(Send,    const Cancelled&);
Rejected                             verdict(Send,    const Finished&);

Next<Finished>                       verdict(Stop,    const Queued&);
Next<Cancelled>                      verdict(Stop,    const Loading&);
Next<Cancelled>                      verdict(Stop,    const Receiving&);
Next<Finished>                       verdict(Stop,    const Prefilling&);
Next<Finished>                       verdict(Stop,    const Decoding&);
Next<Doomed>                         verdict(Stop,    const Stepping&);
Next<Doomed>                         verdict(Stop,    const Verifying&);
Next<Finished>                       verdict(Stop,    const Parked&);
Rejected                             verdict(Stop,    const Sending&);
Rejected                             verdict(Stop,    const Doomed&);
Rejected                             verdict(Stop,    const Cancelled&);
Rejected                             verdict(Stop,    const Finished&);

Next<Finished>                       verdict(Abort,   const Queued&);
Next<Cancelled>                      verdict(Abort,   const Loading&);
Next<Cancelled>                      verdict(Abort,   const Receiving&);
Next<Finished>                       verdict(Abort,   const Prefilling&);
Next<Finished>                       verdict(Abort,   const Decoding&);
Next<Doomed>                         verdict(Abort,   const Stepping&);
Next<Doomed>                         verdict(Abort,   const Verifying&);
Next<Finished>                       verdict(Abort,   const Parked&);
Ignored                              verdict(Abort,   const Sending&);
Ignored                              verdict(Abort,   const Doomed&);
Ignored                              verdict(Abort,   const Cancelled&);
Ignored                              verdict(Abort,   const Finished&);
// clang-format on

// --- what an event from outside does; one overload for each state it can find ---

inline Finished on(Abort, Queued&& request, Store&) noexcept {
    return finish(std::move(request), FinishReason::kAbort);
}
inline Cancelled on(Abort, Loading&& request, Store& store) noexcept {
    return cancel(std::move(request), FinishReason::kAbort, store);
}
inline Cancelled on(Abort, Receiving&& request, Store& store) noexcept {
    return cancel(std::move(request), FinishReason::kAbort, store);
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
inline Doomed on(Abort, Verifying&& request, Store& store) noexcept {
    return doom(std::move(request), FinishReason::kAbort, store);
}
inline Finished on(Abort, Parked&& request, Store& store) noexcept {
    return finish(std::move(request), FinishReason::kAbort, store);
}
// It has all its tokens; its end comes with its transfer's.
inline Sending on(Abort, Sending&& request, Store&) noexcept {
    return std::move(request);
}
// Its terminal event is out already.
inline Doomed on(Abort, Doomed&& request, Store&) noexcept {
    return std::move(request);
}
inline Cancelled on(Abort, Cancelled&& request, Store&) noexcept {
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

// The transition that performs an event on a state: ill-formed where no code does it.
// clang-format off
template <class S> auto perform(Admit, S&& s) -> decltype(admit(std::move(s), std::declval<Admission>(), std::declval<Slot>()));
template <class S> auto perform(Load, S&& s) -> decltype(load(std::move(s), std::declval<LoadAdmission>(), std::declval<Slot>(), TransferId(0)));
template <class S> auto perform(Receive, S&& s) -> decltype(receive(std::move(s), std::declval<ReceiveAdmission>(), std::declval<Slot>(), TransferId(0)));
template <class S> auto perform(Arrive, S&& s) -> decltype(arrive(std::move(s), std::declval<const Arrived&>(), std::declval<Store&>()));
template <class S> auto perform(Arrive, S&& s) -> decltype(arrive(std::move(s), std::declval<const Arrived&>(), std::declval<Store&>(), std::declval<std::vector<Swap>&>()));
template <class S> auto perform(Fail, S&& s) -> decltype(fail(std::move(s), std::declval<const Arrived&>(), std::declval<Store&>()));
template <class S> auto perform(Launch, S&& s) -> decltype(launch(std::move(s), StepId(0), TokenCount(1), std::declval<Berth>()));
template <class S> auto perform(Launch, S&& s) -> decltype(launch(std::move(s), StepId(0), std::declval<Berth>()));
template <class S> auto perform(Launch, S&& s) -> decltype(extend(std::move(s), StepId(0), TokenCount(1), std::declval<Berth>()));
template <class S> auto perform(Speculate, S&& s) -> decltype(speculate(std::move(s), StepId(0), std::declval<Draft>()));
template <class S> auto perform(Land, S&& s) -> decltype(land(std::move(s), std::declval<const Retired&>(), TokenCount(0), std::declval<Store&>(), std::declval<std::vector<Swap>&>()));
template <class S> auto perform(Land, S&& s) -> decltype(land(std::move(s), std::declval<const Retired&>(), std::declval<const Verified&>(), std::declval<Store&>(), std::declval<std::vector<Swap>&>()));
template <class S> auto perform(Land, S&& s) -> decltype(land(std::move(s), std::declval<const Retired&>(), std::declval<Store&>()));
template <class S> auto perform(Park, S&& s) -> decltype(park(std::move(s), std::declval<Store&>()));
template <class S> auto perform(Resume, S&& s) -> decltype(resume(std::move(s), std::declval<Slot>()));
template <class S> auto perform(Retract, S&& s) -> decltype(retract(std::move(s), std::declval<Store&>()));
template <class S> auto perform(Send, S&& s) -> decltype(send(std::move(s), FinishReason::kStop, TransferId(0), std::declval<Manifest>(), std::declval<Store&>()));
template <class S> auto perform(Stop, S&& s) -> decltype(finish(std::move(s), FinishReason::kStop));
template <class S> auto perform(Stop, S&& s) -> decltype(finish(std::move(s), FinishReason::kStop, std::declval<Store&>()));
template <class S> auto perform(Stop, S&& s) -> decltype(doom(std::move(s), FinishReason::kStop, std::declval<Store&>()));
template <class S> auto perform(Stop, S&& s) -> decltype(cancel(std::move(s), FinishReason::kStop, std::declval<Store&>()));
template <class S> auto perform(Abort, S&& s) -> decltype(on(Abort{}, std::move(s), std::declval<Store&>()));
// clang-format on

template <class Event, class State>
struct Performed {
    using type = Rejected;
};
template <class Event, class State>
    requires requires(State s) { perform(Event{}, std::move(s)); }
struct Performed<Event, State> {
    using type = decltype(perform(Event{}, std::declval<State>()));
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

template <class... Event>
consteval bool complete(States<Event...>) {
    return (total<Event>(AllStates{}) && ...);
}

static_assert(complete(AllEvents{}));

}  // namespace table

}  // namespace tokenspeed::control
