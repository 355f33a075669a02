// What a step runs: rows are drafted, and pages found for them.

#include <algorithm>

#include "scheduler.h"

namespace tokenspeed::control {

std::optional<Plan> Scheduler::plan(std::int64_t now_us) {
    pass_to(now_us);
    store_.index.sessions().advance(now_us_);
    apply_events();
    refuse_late();
    if (ledger_.full()) return std::nullopt;
    rows_.clear();
    budget_ = step_tokens_max_;
    starved_ = false;
    resting_.reset();
    decode_count_ = 0;
    make_slot();
    draft_decodes();
    draft_guesses();
    decode_count_ = static_cast<std::int32_t>(rows_.size());
    draft_proposals(0);
    draft_prefills();
    draft_proposals(static_cast<std::size_t>(decode_count_));
    if (rows_.empty() && transfer_news_.ids.empty()) return std::nullopt;
    return launch_drafts();
}

const Request& Scheduler::running(SlotId slot) const noexcept {
    if (const auto* request = decoding_.at(slot)) return *request->request;
    if (const auto* request = stepping_.at(slot)) return *request->request;
    if (const auto* request = verifying_.at(slot)) return *request->request;
    return *prefilling_.at(slot)->request;
}

void Scheduler::draft(SlotId slot, TokenCount start, TokenCount count, bool samples) {
    rows_.push_back({slot, start, count, samples});
    budget_ -= count.value;
    turns_.charge(line_of(slot), count.value);
}

// Takes a request's row out of the plan again.
void Scheduler::undraft(SlotId slot) noexcept {
    const auto row = std::ranges::find(rows_, slot, &Row::slot);
    if (row == rows_.end()) return;
    budget_ += row->count.value;
    turns_.charge(line_of(slot), -row->known());
    if (row - rows_.begin() < decode_count_) --decode_count_;
    rows_.erase(row);
}

bool Scheduler::decodes_next(const Stepping& request) const noexcept {
    return request.fed >= request.request->known() &&
           !request.request->exhausted(request.pending, context_max_);
}

void Scheduler::draft_decodes() {
    if (drafts_) {
        followed_.clear();
        for (const SlotId slot : order_) followed_.push_back(&running(slot));
        drafts_->follow(followed_);
    }
    for (std::size_t rank = 0; rank < order_.size();) {
        const SlotId slot = order_[rank];
        const Decoding* rests = decoding_.at(slot);
        const Stepping* flies = stepping_.at(slot);
        const bool decodes = rests != nullptr || (flies != nullptr && decodes_next(*flies));
        const bool waits = flies != nullptr && drafts_ &&
                           (flies->proposes || drafts_->wants_rest(*flies->request));
        if (!decodes || resting_ == slot || waits) {
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

// Adds guesses to the rows of requests at rest, as far as their source has any and pages are at
// hand: nobody gives way to a guess, and a page for each who runs is left.
void Scheduler::draft_guesses() {
    if (!drafts_) return;
    guesses_.clear();
    TokenCount left(std::min(step_drafts_max_, budget_));
    StepWork work;
    TokenCount longest;
    for (const Row& row : rows_) {
        work.add_decode(row.start);
        longest = std::max(longest, row.start);
        if (!decoding_.at(row.slot)) continue;
        const Decoding& rests = *decoding_.at(row.slot);
        const TokenCount most = rests.request->remaining(context_max_) - TokenCount(1);
        if (most <= TokenCount(0)) continue;
        guesses_.push_back({&*rests.request, std::min(most, left), &rests.proposal, {}});
    }
    if (guesses_.empty() || left <= TokenCount(0)) return;
    std::optional<double> limit_us;
    if (floor_.held() && work.decode_rows > 1) limit_us = floor_.limit_us(model_, longest);
    drafts_->draft(guesses_, {work, left, prompts_wait(), limit_us}, model_);
    auto guess = guesses_.begin();
    for (Row& row : rows_) {
        if (guess == guesses_.end()) break;
        if (&running(row.slot) != guess->request) continue;
        std::vector<std::int32_t> draft = std::move(guess->draft);
        const TokenCount wanted(static_cast<std::int32_t>(draft.size()));
        const TokenCount reached =
            reach_for(row.slot, row.start, std::min({wanted, guess->most, left}));
        draft.resize(static_cast<std::size_t>(reached.value));
        if (wanted > TokenCount(0))
            row.expected += (guess->expected - 1) * reached.value / wanted.value;
        row.draft = std::move(draft);
        row.count += reached;
        budget_ -= reached.value;
        left -= reached;
        ++guess;
    }
}

// How many guesses after the token at `start` the pages at hand have room for.
TokenCount Scheduler::reach_for(SlotId slot, TokenCount start, TokenCount guesses) {
    Decoding& request = *decoding_.at(slot);
    each_group([&]<class G>() {
        if (!store_.index.has<G>()) return;
        while (guesses > TokenCount(0)) {
            if (lacks<G>(request, start + guesses + TokenCount(1)) == PageCount(0)) break;
            const PageCount others(static_cast<std::int32_t>(order_.size()));
            reserve_growth<G>(request);
            if (store_.index.available<G>() > others) {
                if (auto page = store_.index.take<G>()) {
                    grow<G>(request, std::move(*page));
                    continue;
                }
            }
            guesses -= TokenCount(1);
        }
    });
    return guesses;
}

// Running prompts and waiting ones share what the decode rows left of the step, turn by turn: a
// long prompt that runs keeps out neither a more urgent one nor that of a tenant given less.
void Scheduler::draft_prefills() {
    served_.assign(static_cast<std::size_t>(slots_max_), false);
    full_ = false;
    const std::size_t before = rows_.size();
    std::size_t rank = 0;
    bool wanted = turns_.head().has_value();
    while (budget_ > 0) {
        const auto turn = next_turn(rank);
        wanted = wanted || turn;
        if (seat_next(turn)) continue;
        if (!turn) break;
        served_[static_cast<std::size_t>(order_[rank].value)] = true;
        draft_chunk(rank);
    }
    floor_.launched(wanted, rows_.size() > before);
}

// The running prompt whose turn it is, and its rank in the order.
std::optional<FairQueue::Turn> Scheduler::next_turn(std::size_t& rank) const noexcept {
    std::optional<FairQueue::Turn> first;
    for (std::size_t other = 0; other < order_.size(); ++other) {
        const SlotId slot = order_[other];
        if (served_[static_cast<std::size_t>(slot.value)] || resting_ == slot) continue;
        if (prompt_left(slot) <= TokenCount(0)) continue;
        const auto turn = turns_.turn(line_of(slot), running(slot).order().arrival);
        if (first && *first < turn) continue;
        first = turn;
        rank = other;
    }
    return first;
}

// What of its known tokens is still to be fed; what decodes has none.
TokenCount Scheduler::prompt_left(SlotId slot) const noexcept {
    if (decoding_.at(slot) || verifying_.at(slot)) return TokenCount(0);
    const Stepping* flies = stepping_.at(slot);
    return running(slot).known() - (flies ? flies->fed : prefilling_.at(slot)->fed);
}

// Drafts a row of what the request has still to feed.
Scheduler::Room Scheduler::draft_chunk(std::size_t rank) {
    const SlotId slot = order_[rank];
    const TokenCount known = running(slot).known();
    const TokenCount fed = known - prompt_left(slot);
    const TokenCount chunk =
        chunk_within_floor(fed, std::min(chunk_from(fed, running(slot)), TokenCount(budget_)));
    if (chunk == TokenCount(0)) return Room::kWait;
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
// nothing left to evict, another request gives way.
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

// Frees pages for the request: one that comes after it in order gives way. In flight it cannot:
// then it is left out of this plan, and gives way once its step retired.
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
    victim = cheapest_victim(rank);
    // All behind it are about to make progress, after which one of them gives way.
    if (victim == rank && rank + 1 < order_.size()) return Room::kWait;
    if (stepping_.at(order_[victim]) || verifying_.at(order_[victim])) {
        resting_ = order_[victim];
        undraft(order_[victim]);
        return Room::kWait;
    }
    retract_from(order_[victim]);
    return victim == rank ? Room::kGone : Room::kReady;
}

void Scheduler::retract_from(SlotId slot) {
    prepare_return(running(slot));
    leave_order(slot);
    undraft(slot);
    if (decoding_.at(slot)) {
        take_back(retract(decoding_.take(slot), store_));
    } else {
        take_back(retract(prefilling_.take(slot), store_));
    }
}

void Scheduler::retract_parked(const Order& order) {
    prepare_return(*parked_.at(order)->request);
    take_back(retract(parked_.take(order), store_));
}

// Everything that a request's way back to the queue may have to say.
void Scheduler::prepare_return(const Request& request) {
    reserve_endings(1);
    if (!may_return(request, store_.index)) return;
    queued_.reserve(request.order());
    wait(request);
}

void Scheduler::take_back(Queued&& retracted) noexcept {
    ++retractions_;
    if (!may_return(*retracted.request, store_.index)) {
        return conclude(finish(std::move(retracted), FinishReason::kLength));
    }
    places_.find(retracted.request->id().value)->second.slot.reset();
    queued_.put(std::move(retracted));
}

}  // namespace tokenspeed::control
