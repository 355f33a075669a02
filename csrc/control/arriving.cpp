// What comes from outside: requests, aborts, transfers that are over. They are queued as they come
// and taken up at the start of the next plan.

#include <algorithm>

#include "events.h"
#include "scheduler.h"

namespace tokenspeed::control {

void Scheduler::submit(Submission&& wish) {
    if (places_.contains(wish.id.value)) {
        throw InvalidParameter("the request id " + text(wish.id.value) + " is in use");
    }
    if (wish.prompt.empty()) throw InvalidParameter("the prompt must hold at least one token");
    if (wish.max_new_tokens < 1) {
        throw InvalidParameter("max_new_tokens must be at least 1, but is " +
                               text(wish.max_new_tokens));
    }
    if (wish.min_new_tokens < 0) {
        throw InvalidParameter("min_new_tokens must be at least 0, but is " +
                               text(wish.min_new_tokens));
    }
    if (wish.handover == Handover::kReceive && wish.prompt.size() < 2) {
        throw InvalidParameter(
            "a request whose KV is received must hold a prompt and the token sampled after it");
    }
    if (const auto bad = std::ranges::find_if(wish.prompt, [](auto token) { return token < 0; });
        bad != wish.prompt.end()) {
        throw InvalidParameter("token ids must be at least 0, but position " +
                               text(bad - wish.prompt.begin()) + " of the prompt holds " +
                               text(*bad));
    }
    if (wish.prompt.size() >= static_cast<std::size_t>(context_max_.value)) {
        throw ContextOverflow("the prompt holds " +
                              text(static_cast<std::int64_t>(wish.prompt.size())) +
                              " tokens, which leaves no room to generate in a context of " +
                              text(context_max_.value) + "; shorten it or raise --max-context");
    }
    const std::int64_t id = wish.id.value;
    const Order order{wish.priority, arrivals_seen_};
    Queued queued(RequestBox(std::move(wish), order, page_size_));
    const LineId line = turns_.join(order.priority, queued.request->tenant());
    try {
        places_.emplace(id, Place{order, line, {}, {}, {}, {}, {}});
        arrivals_.emplace_back(std::move(queued));
    } catch (...) {
        places_.erase(id);
        turns_.part(line);
        throw;
    }
    ++arrivals_seen_;
}

void Scheduler::abort(RequestId request) {
    const auto found = places_.find(request.value);
    if (found != places_.end()) arrivals_.emplace_back(Aborted{request, found->second.order});
}

void Scheduler::transferred(TransferId transfer, bool complete) {
    // One that the next plan will begin is not under way yet.
    const bool announced =
        std::ranges::find(transfer_news_.ids, transfer.value) == transfer_news_.ids.end();
    if (!announced || !transfers_.owner(transfer)) {
        throw EngineError("no transfer " + text(transfer.value) + " is under way");
    }
    arrivals_.emplace_back(Report{transfer, complete});
}

void Scheduler::apply_events() {
    for (; !arrivals_.empty(); arrivals_.pop_front()) {
        std::visit([&](auto&& event) { apply(std::move(event)); }, std::move(arrivals_.front()));
    }
}

void Scheduler::apply(Queued&& submitted) {
    const Request& request = *submitted.request;
    if (!may_begin(request, store_.index)) {
        reserve_endings(1);
        conclude(finish(std::move(submitted), FinishReason::kRejected));
        return;
    }
    if (queue_timeout_us_) {
        const auto wait_us = expected_wait_us(request);
        if (wait_us && *wait_us > *queue_timeout_us_) {
            refuse(std::move(submitted), wait_us);
            return;
        }
        const std::int64_t wait_max_us = std::min(*queue_timeout_us_, kTimeMaxUs);
        deadlines_.push_back({request.order(), now_us_ + wait_max_us});
    }
    queued_.reserve(request.order());
    Place& place = places_.find(request.id().value)->second;
    place.branch = store_.index.begin(request.hashes(), now_us_);
    submitted.request->joins(*place.branch);
    wait(request);
    queued_.put(std::move(submitted));
}

void Scheduler::apply(Aborted aborted) {
    const auto found = places_.find(aborted.request.value);
    // It finished after the abort was sent, and its id may be another's by now.
    if (found == places_.end() || found->second.order != aborted.order) return;
    reserve_endings(1);
    if (const Request* live = find(found->second)) found->second.outputs = live->outputs();
    const auto seated = [&](auto&& request) {
        leave_order(request.slot.id());
        conclude(on(Abort{}, std::move(request), store_));
    };
    std::visit(
        Overloaded{
            [&](Queued&& request) { conclude(on(Abort{}, std::move(request), store_)); },
            [&](Loading&& request) { conclude(on(Abort{}, std::move(request), store_)); },
            [&](Receiving&& request) { conclude(on(Abort{}, std::move(request), store_)); },
            [&](Prefilling&& request) { seated(std::move(request)); },
            [&](Decoding&& request) { seated(std::move(request)); },
            [&](Stepping&& request) { seated(std::move(request)); },
            [&](Verifying&& request) { seated(std::move(request)); },
            [&](Parked&& request) { conclude(on(Abort{}, std::move(request), store_)); },
            [&](Sending&& request) { sending_.put(on(Abort{}, std::move(request), store_)); },
            [&](Doomed&& request) { doomed_.put(on(Abort{}, std::move(request), store_)); },
            [&](Cancelled&& request) { cancelled_.put(on(Abort{}, std::move(request), store_)); }},
        extract(found->second));
}

void Scheduler::apply(const Report& report) {
    const auto slot = transfers_.owner(report.transfer);
    if (!slot) return;  // Reported twice.
    reserve_endings(1);
    const auto prepare = [&](auto& request) {
        reserve_arrival(request, swaps_);
        for (GroupPlan& group : news_) group.table.reserve(swaps_.capacity());
        if (report.complete) return;
        queued_.reserve(request.request->order());
        wait(*request.request);
    };
    if (Loading* request = loading_.at(*slot)) prepare(*request);
    if (Receiving* request = receiving_.at(*slot)) prepare(*request);

    const Arrived done = transfers_.arrive(*slot);
    const auto back = [&](Queued&& request) {
        places_.find(request.request->id().value)->second.slot.reset();
        queued_.put(std::move(request));
    };
    std::visit(Overloaded{[&](Loading&& request) {
                              if (!report.complete)
                                  return back(fail(std::move(request), done, store_));
                              take_in(arrive(std::move(request), done, store_, swaps_));
                          },
                          [&](Receiving&& request) {
                              if (!report.complete)
                                  return back(fail(std::move(request), done, store_));
                              take_in(arrive(std::move(request), done, store_, swaps_));
                          },
                          [&](Sending&& request) {
                              conclude(report.complete ? arrive(std::move(request), done, store_)
                                                       : fail(std::move(request), done, store_));
                          },
                          [&](Cancelled&& request) {
                              // Its terminal event is out already.
                              const Finished finished =
                                  report.complete ? arrive(std::move(request), done, store_)
                                                  : fail(std::move(request), done, store_);
                              forget(finished.id);
                          }},
               extract_travelling(*slot));
}

void Scheduler::take_in(Prefilling&& arrived) noexcept {
    const SlotId slot = prefilling_.put(std::move(arrived)).slot.id();
    tell_swaps(slot);
    line_up(slot);
}

Scheduler::Live Scheduler::extract(const Place& place) noexcept {
    if (!place.slot) {
        if (queued_.at(place.order)) {
            turns_.leave(place.line, place.order.arrival);
            return queued_.take(place.order);
        }
        return parked_.take(place.order);
    }
    const SlotId slot = *place.slot;
    if (loading_.at(slot)) return loading_.take(slot);
    if (receiving_.at(slot)) return receiving_.take(slot);
    if (prefilling_.at(slot)) return prefilling_.take(slot);
    if (decoding_.at(slot)) return decoding_.take(slot);
    if (stepping_.at(slot)) return stepping_.take(slot);
    if (verifying_.at(slot)) return verifying_.take(slot);
    if (sending_.at(slot)) return sending_.take(slot);
    if (doomed_.at(slot)) return doomed_.take(slot);
    return cancelled_.take(slot);
}

Scheduler::Travelling Scheduler::extract_travelling(SlotId slot) noexcept {
    if (loading_.at(slot)) return loading_.take(slot);
    if (receiving_.at(slot)) return receiving_.take(slot);
    if (sending_.at(slot)) return sending_.take(slot);
    return cancelled_.take(slot);
}

}  // namespace tokenspeed::control
