// Who gets a slot: waiting requests by their order, and those that gave theirs up.

#include <algorithm>

#include "scheduler.h"

namespace tokenspeed::control {

// A more urgent request does not wait for a slot that a less urgent one holds.
void Scheduler::make_slot() {
    if (!store_.slots.empty() || order_.empty()) return;
    const Queued* queued = queued_.head();
    const Parked* parked = parked_.head();
    if (queued == nullptr && parked == nullptr) return;
    const SlotId slot = order_.back();
    const std::int32_t held = running(slot).order().priority;
    const bool urgent = (queued != nullptr && queued->request->order().priority < held) ||
                        (parked != nullptr && parked->request->order().priority < held);
    if (!urgent || (queued != nullptr && !floor_admits(*queued->request, slot))) return;
    if (decoding_.at(slot)) {
        // The index has room for what as many parked requests hold as may run.
        if (parked_.count() < static_cast<std::size_t>(slots_max_)) {
            park_from(slot);
        } else {
            retract_from(slot);
        }
    } else if (const Stepping* flies = stepping_.at(slot); flies && decodes_next(*flies)) {
        resting_ = slot;
    }
}

void Scheduler::park_from(SlotId slot) {
    const Request& request = running(slot);
    parked_.reserve(request.order());
    places_.find(request.id().value)->second.slot.reset();
    leave_order(slot);
    parked_.put(park(decoding_.take(slot), store_));
    ++parkings_;
}

// Seats whoever's turn it is if that comes before a given turn and it has all it needs. Nobody
// overtakes one that does not fit, in this plan. Who gave up a slot comes before all of its
// priority.
bool Scheduler::seat_next(const std::optional<FairQueue::Turn>& before) {
    const auto head = turns_.head();
    const Parked* parked = parked_.head();
    if (full_ || (!head && parked == nullptr)) return false;
    if (parked != nullptr) {
        const Order order = parked->request->order();
        if ((!head || order.priority <= head->priority) &&
            (!before || order.priority <= before->priority)) {
            full_ = starved_ || store_.slots.empty();
            return !full_ && seat_parked(order);
        }
    }
    if (!head || (before && *before < *head)) return false;
    // A slot is of no use to a prompt that the floor leaves no room for.
    if (chunk_within_floor(TokenCount(0), TokenCount(1)) == TokenCount(0)) return false;
    full_ = starved_ || store_.slots.empty() || !seat_queued({head->priority, head->arrival});
    return !full_;
}

bool Scheduler::seat_parked(const Order& order) {
    const Request& request = *parked_.at(order)->request;
    reserve_seat(request);
    const Prefilling& resumed = prefilling_.put(resume(parked_.take(order), *store_.slots.take()));
    const SlotId slot = resumed.slot.id();
    bind(slot, resumed.request->id());
    tell_table(resumed);
    line_up(slot);
    return true;
}

bool Scheduler::seat_queued(const Order& order) {
    if (!floor_admits(*queued_.at(order)->request, std::nullopt)) return false;
    for (;;) {
        const Queued& queued = *queued_.at(order);
        const Request& request = *queued.request;
        const PageCount reserve = reserve_for(request);
        const auto still_blocked = [&] {
            if (!blocked_ || blocked_->order != order) return false;
            bool blocked = false;
            each_group([&]<class G>() {
                const PageCount spare = kPaged<G> ? reserve : PageCount(0);
                blocked = blocked || (store_.index.has<G>() && blocked_->wanted.of<G>() + spare >
                                                                   store_.index.available<G>());
            });
            return blocked;
        };
        if (!still_blocked()) {
            reserve_seat(request);
            auto probed = probe(queued, reserve, TokenCount(step_tokens_max_), store_);
            const auto sit = [&](auto&& ticket) {
                turns_.leave(line_of(request.id()), order.arrival);
                seat(queued_.take(order), std::move(ticket));
                return true;
            };
            const bool seated = std::visit(
                Overloaded{[&](Admission&& ticket) { return sit(std::move(ticket)); },
                           [&](LoadAdmission&& ticket) { return sit(std::move(ticket)); },
                           [&](ReceiveAdmission&& ticket) { return sit(std::move(ticket)); },
                           [&](Refused&& refused) {
                               blocked_ = {order, refused.wanted};
                               return false;
                           }},
                std::move(probed));
            if (seated) return true;
        }
        // Whoever is parked behind it holds pages it could use.
        const Parked* parked = parked_.last();
        if (parked == nullptr || parked->request->order() < order) return false;
        retract_parked(parked->request->order());
    }
}

// Everything that taking a seat may have to say.
void Scheduler::reserve_seat(const Request& request) {
    const auto pages = static_cast<std::size_t>(pages_for(request.known(), page_size_).value);
    make_room_for(rows_, 1);
    make_room_for(outcome_.admitted, 1);
    make_room_for(outcome_.reports, kReportColumns);
    make_room_for(bound_slots_, 1);
    make_room_for(bound_requests_, 1);
    make_room_for(transfer_news_.ids, 1);
    make_room_for(transfer_news_.requests, 1);
    make_room_for(transfer_news_.kinds, 1);
    each_group([&]<class G>() {
        if (!store_.index.has<G>()) return;
        GroupPlan& news = news_of<G>();
        news.table.reserve(pages + 1);
        if (store_.index.tier<G, Host>().present()) news.loads.reserve(pages + 1);
        if (request.receives()) news.handovers.reserve(pages + 1);
    });
}

void Scheduler::bind(SlotId slot, RequestId request) noexcept {
    Place& place = places_.find(request.value)->second;
    place.slot = slot;
    lines_[static_cast<std::size_t>(slot.value)] = place.line;
    bound_slots_.push_back(slot.value);
    bound_requests_.push_back(request.value);
}

void Scheduler::line_up(SlotId slot) noexcept {
    const auto behind = std::ranges::find_if(
        order_, [&](SlotId other) { return running(other).order() > running(slot).order(); });
    order_.insert(behind, slot);
}

void Scheduler::count_admission(const Request& request, bool first) noexcept {
    if (!first) return;
    const CacheReport report =
        store_.index.explain(request.hashes(), request.tokens(), request.cached());
    prompt_tokens_ += request.known().value;
    cached_tokens_ += report.cached.value;
    missed_evicted_tokens_ += report.evicted.value;
    (report.other_salt ? missed_other_salt_tokens_ : missed_unseen_tokens_) += report.unseen.value;
    missed_tail_tokens_ += report.tail.value;
    outcome_.admitted.push_back(request.id().value);
    for (const TokenCount count :
         {report.cached, report.evicted, report.unseen, report.tail, report.divergence}) {
        outcome_.reports.push_back(count.value);
    }
}

// The page table of a request that took a slot: the pages it holds or waits for, and its state.
template <class State>
void Scheduler::tell_table(const State& request) noexcept {
    const SlotId slot = request.slot.id();
    each_group([&]<class G>() {
        if (!store_.index.has<G>()) return;
        const Resting<G>& pages = request.pages.template of<G>();
        TableDeltas& table = news_of<G>().table;
        std::size_t index = static_cast<std::size_t>(pages.first);
        if constexpr (kPaged<G>) {
            std::size_t load = 0;
            const auto incoming = [&](std::size_t at) {
                if constexpr (requires { request.loads; }) {
                    const auto& loads = request.loads.template of<G>().pages;
                    if (load == loads.size() || static_cast<std::size_t>(loads[load].index) != at) {
                        return false;
                    }
                    table.add(slot, at, loads[load++].target.id().value);
                    return true;
                }
                return false;
            };
            for (const auto& ref : pages.sealed) {
                while (incoming(index)) ++index;
                table.add(slot, index++, ref.id().value);
            }
            while (incoming(index)) ++index;
            if constexpr (requires { request.arrivals; }) {
                for (const auto& page : request.arrivals.template of<G>()) {
                    table.add(slot, index++, page.id().value);
                }
            }
        } else {
            index = 0;
            if constexpr (requires { request.loads; }) {
                for (const auto& load : request.loads.template of<G>().pages) {
                    table.add(slot, index, load.target.id().value);
                }
            }
            if constexpr (requires { request.arrivals; }) {
                for (const auto& page : request.arrivals.template of<G>()) {
                    table.add(slot, index, page.id().value);
                }
            }
        }
        if (pages.tail) table.add(slot, index, pages.tail->id().value);
    });
}

// Takes an admitted request to a slot; its first chunk is drafted when its turn comes.
void Scheduler::seat(Queued&& queued, Admission&& ticket) noexcept {
    const bool first = !queued.request->was_admitted();
    const Prefilling& request =
        prefilling_.put(admit(std::move(queued), std::move(ticket), *store_.slots.take()));
    const SlotId slot = request.slot.id();
    count_admission(*request.request, first);
    bind(slot, request.request->id());
    tell_table(request);
    line_up(slot);
}

void Scheduler::seat(Queued&& queued, LoadAdmission&& ticket) noexcept {
    const bool first = !queued.request->was_admitted();
    Slot seat = *store_.slots.take();
    const TransferId transfer = transfers_.begin(seat.id());
    const Loading& request =
        loading_.put(load(std::move(queued), std::move(ticket), std::move(seat), transfer));
    count_admission(*request.request, first);
    bind(request.slot.id(), request.request->id());
    tell_table(request);
    const std::int32_t entry = tell_transfer(transfer, TransferKind::kLoad, request.request->id());
    each_group([&]<class G>() {
        for (const auto& page : request.loads.of<G>().pages) {
            news_of<G>().loads.add(entry, page.source.id().value, page.target.id().value);
            ++loads_;
        }
    });
}

void Scheduler::seat(Queued&& queued, ReceiveAdmission&& ticket) noexcept {
    const bool first = !queued.request->was_admitted();
    Slot seat = *store_.slots.take();
    const TransferId transfer = transfers_.begin(seat.id());
    const Receiving& request =
        receiving_.put(receive(std::move(queued), std::move(ticket), std::move(seat), transfer));
    count_admission(*request.request, first);
    bind(request.slot.id(), request.request->id());
    tell_table(request);
    const std::int32_t entry =
        tell_transfer(transfer, TransferKind::kReceive, request.request->id());
    each_group([&]<class G>() {
        const Resting<G>& pages = request.pages.of<G>();
        std::int32_t index = pages.first + static_cast<std::int32_t>(pages.sealed.size());
        for (const auto& page : request.arrivals.of<G>()) {
            news_of<G>().handovers.add(entry, index++, page.id().value);
        }
    });
}

}  // namespace tokenspeed::control
