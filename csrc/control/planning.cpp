// What a step runs: rows are drafted, and pages found for them.

#include <algorithm>

#include "scheduler.h"

namespace tokenspeed::control {

std::optional<Plan> Scheduler::plan(std::int64_t now_us) {
    now_us_ = std::max(now_us_, now_us);
    apply_events();
    if (ledger_.full()) return std::nullopt;
    rows_.clear();
    budget_ = step_tokens_max_;
    starved_ = false;
    resting_.reset();
    decode_count_ = 0;
    make_slot();
    draft_decodes();
    decode_count_ = static_cast<std::int32_t>(rows_.size());
    draft_prefills();
    if (rows_.empty() && transfer_news_.ids.empty()) return std::nullopt;
    return launch_drafts();
}

const Request& Scheduler::running(SlotId slot) const noexcept {
    if (const auto* request = decoding_.at(slot)) return *request->request;
    if (const auto* request = stepping_.at(slot)) return *request->request;
    return *prefilling_.at(slot)->request;
}

void Scheduler::draft(SlotId slot, TokenCount start, TokenCount count, bool samples) {
    rows_.push_back({slot, start, count, samples});
    budget_ -= count.value;
}

// Takes a request's row out of the plan again.
void Scheduler::undraft(SlotId slot) noexcept {
    const auto row = std::ranges::find(rows_, slot, &Row::slot);
    if (row == rows_.end()) return;
    budget_ += row->count.value;
    if (row - rows_.begin() < decode_count_) --decode_count_;
    rows_.erase(row);
}

bool Scheduler::decodes_next(const Stepping& request) const noexcept {
    return request.fed >= request.request->known() &&
           !request.request->exhausted(request.pending, context_max_);
}

void Scheduler::draft_decodes() {
    for (std::size_t rank = 0; rank < order_.size();) {
        const SlotId slot = order_[rank];
        const Decoding* rests = decoding_.at(slot);
        const Stepping* flies = stepping_.at(slot);
        const bool decodes = rests != nullptr || (flies != nullptr && decodes_next(*flies));
        if (!decodes || resting_ == slot) {
            ++rank;
            continue;
        }
        const TokenCount start =
            rests != nullptr ? rests->request->known() - TokenCount(1) : flies->fed;
        const Room room = find_pages(rank, start + TokenCount(1));
        if (room == Room::kReady) {
            promise_checkpoint(slot, start + TokenCount(1));
            draft(slot, start, TokenCount(1), true);
        }
        if (room != Room::kGone) ++rank;
    }
}

// Running prompts and waiting ones share what the decode rows left of the step, in order: a long
// prompt that runs does not keep out a more urgent one that waits.
void Scheduler::draft_prefills() {
    for (std::size_t rank = 0; budget_ > 0;) {
        if (rank == order_.size()) {
            if (!seat_next(std::nullopt)) return;
        } else if (!seat_next(running(order_[rank]).order()) && draft_chunk(rank) != Room::kGone) {
            ++rank;
        }
    }
}

// Drafts a row of what the request has still to feed.
Scheduler::Room Scheduler::draft_chunk(std::size_t rank) {
    const SlotId slot = order_[rank];
    if (resting_ == slot || budget_ == 0) return Room::kWait;
    const Prefilling* rests = prefilling_.at(slot);
    const Stepping* flies = stepping_.at(slot);
    if (rests == nullptr && flies == nullptr) return Room::kWait;
    const TokenCount fed = rests != nullptr ? rests->fed : flies->fed;
    const TokenCount known = running(slot).known();
    if (fed >= known) return Room::kWait;
    const TokenCount chunk = std::min(chunk_from(fed, running(slot)), TokenCount(budget_));
    const Room room = find_pages(rank, fed + chunk);
    if (room != Room::kReady) return room;
    promise_checkpoint(slot, fed + chunk);
    draft(slot, fed, chunk, fed + chunk == known);
    return Room::kReady;
}

// What may be fed in one piece: the state of a recurrence is kept at certain ends of pages, and a
// piece ends there.
TokenCount Scheduler::chunk_from(TokenCount fed, const Request& request) const noexcept {
    TokenCount end = request.known();
    if (store_.index.has<Recurrent>()) {
        const std::int32_t interval = store_.index.checkpoint_pages() * page_size_.value;
        end = std::min(end, TokenCount((fed.value / interval + 1) * interval));
        const TokenCount last = last_reusable(request);
        if (fed < last) end = std::min(end, last);
    }
    return end - fed;
}

// The last end of a page that the next turn of a conversation can begin at.
TokenCount Scheduler::last_reusable(const Request& request) const noexcept {
    return TokenCount((request.known().value - 1) / page_size_.value * page_size_.value);
}

// Where the state of a recurrence is worth keeping, and a page is at hand, a copy of it is made.
void Scheduler::promise_checkpoint(SlotId slot, TokenCount end) {
    if (!store_.index.has<Recurrent>() || !store_.index.tree().shared()) return;
    const std::int32_t interval = store_.index.checkpoint_pages() * page_size_.value;
    if (end.value % interval != 0 && end != last_reusable(running(slot))) return;
    const auto promise = [&](auto& request) {
        if (!request.pages.recurrent.promised.empty()) return;
        reserve_growth<Recurrent>(request);
        if (auto page = store_.index.take<Recurrent>()) grow<Recurrent>(request, std::move(*page));
    };
    if (Decoding* request = decoding_.at(slot)) promise(*request);
    if (Prefilling* request = prefilling_.at(slot)) promise(*request);
    if (Stepping* request = stepping_.at(slot)) promise(*request);
}

// --- pages --------------------------------------------------------------------------------------

Scheduler::Room Scheduler::find_pages(std::size_t rank, TokenCount end) {
    Room room = Room::kReady;
    each_group([&]<class G>() {
        if (room == Room::kReady && kPaged<G> && store_.index.has<G>()) {
            room = find_pages<G>(rank, end);
        }
    });
    return room;
}

// Finds the pages of a group that the request's first `end` tokens need. When the cache has
// nothing left to evict, whoever comes last in order gives way.
template <class G>
Scheduler::Room Scheduler::find_pages(std::size_t rank, TokenCount end) {
    const SlotId slot = order_[rank];
    const auto provide = [&](auto& request) {
        while (lacks<G>(request, end) > PageCount(0)) {
            reserve_growth<G>(request);
            auto page = store_.index.take<G>();
            if (!page) return false;
            grow<G>(request, std::move(*page));
        }
        return true;
    };
    for (;;) {
        Decoding* decoding = decoding_.at(slot);
        Prefilling* prefilling = prefilling_.at(slot);
        const bool ready = decoding != nullptr     ? provide(*decoding)
                           : prefilling != nullptr ? provide(*prefilling)
                                                   : provide(*stepping_.at(slot));
        if (ready) return Room::kReady;
        if (const Room room = make_way(rank); room != Room::kReady) return room;
    }
}

// Frees pages for the request: the last in order of those who hold any gives way. In flight it
// cannot: then it is left out of this plan, and gives way once its step retired.
Scheduler::Room Scheduler::make_way(std::size_t rank) {
    const SlotId slot = order_[rank];
    if (const Parked* parked = parked_.last();
        parked != nullptr && running(slot).order() < parked->request->order()) {
        retract_parked(parked->request->order());
        return Room::kReady;
    }
    starved_ = true;
    // Pages are on their way back already.
    if (resting_ || doomed_.count() > 0) return Room::kWait;
    std::size_t victim = order_.size() - 1;
    if (victim == 0 && parked_.count() == 0) {
        if (stepping_.at(slot) || transfers_.under_way() > 0) return Room::kWait;
        // Alone it fills the pool: it ends here, and leaves the step to those who wait.
        starved_ = false;
        reserve_endings(1);
        leave_order(slot);
        if (decoding_.at(slot)) {
            conclude(finish(decoding_.take(slot), FinishReason::kLength, store_));
        } else {
            conclude(finish(prefilling_.take(slot), FinishReason::kLength, store_));
        }
        return Room::kGone;
    }
    while (victim > rank && !may_be_retracted(running(order_[victim]))) --victim;
    // All behind it are about to make progress, after which one of them gives way.
    if (victim == rank && rank + 1 < order_.size()) return Room::kWait;
    if (stepping_.at(order_[victim])) {
        resting_ = order_[victim];
        undraft(order_[victim]);
        return Room::kWait;
    }
    retract_from(order_[victim]);
    return victim == rank ? Room::kGone : Room::kReady;
}

void Scheduler::retract_from(SlotId slot) {
    const Request& request = running(slot);
    queued_.reserve(request.order());
    places_.find(request.id().value)->second.slot.reset();
    leave_order(slot);
    undraft(slot);
    if (decoding_.at(slot)) {
        queued_.put(retract(decoding_.take(slot), store_));
    } else {
        queued_.put(retract(prefilling_.take(slot), store_));
    }
    ++retractions_;
}

void Scheduler::retract_parked(const Order& order) {
    queued_.reserve(order);
    queued_.put(retract(parked_.take(order), store_));
    ++retractions_;
}

}  // namespace tokenspeed::control
