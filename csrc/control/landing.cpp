// How a step's return is taken in: it retires, its tokens go to their requests, some of which end.

#include <algorithm>

#include "room.h"
#include "scheduler.h"

namespace tokenspeed::control {

void Scheduler::commit(StepId step, std::span<const std::int32_t> tokens, std::int64_t now_us,
                       const Proposed& proposed, std::span<const CutDraft> cuts) {
    if (flights_.empty()) {
        throw EngineError("no step is in flight, but step " + text(step.value) + " was committed");
    }
    Flight& flight = flights_.front();
    if (flight.step != step) {
        throw EngineError("steps are committed in order: wanted step " + text(flight.step.value) +
                          ", but got " + text(step.value));
    }
    if (tokens.size() != flight.samples) {
        throw EngineError("step " + text(step.value) + " samples " +
                          text(static_cast<std::int64_t>(flight.samples)) + " tokens, but got " +
                          text(static_cast<std::int64_t>(tokens.size())));
    }
    if (std::ranges::any_of(tokens, [](std::int32_t token) { return token < 0; })) {
        throw EngineError("step " + text(step.value) + " returned a negative token id");
    }
    check_proposed(flight, proposed);
    cut_drafts(flight, cuts);
    reserve_commit(flight);
    reserve_proposals(flight, proposed);

    pass_to(now_us);
    const Retired done = ledger_.retire();
    each_group([&]<class G>() {
        for (auto& stored : flight.stores.of<G>()) store_.index.stow<G>(std::move(stored), done);
    });
    std::int32_t sample = 0;
    for (const Row& row : flight.rows) {
        const auto samples = tokens.subspan(static_cast<std::size_t>(sample), row.sample_count());
        if (doomed_.at(row.slot)) {
            land_doomed(row.slot, done);
        } else if (verifying_.at(row.slot)) {
            land_verifying(row, done, samples.first(samples.size() - row.cut), sample);
        } else {
            std::optional<std::int32_t> token;
            if (row.samples) token = samples.front();
            land_row(row, done, token, sample);
        }
        sample += static_cast<std::int32_t>(row.sample_count());
    }
    // What a user waits for is the whole turn: from the step before, if others ran, to this one. A
    // step that only moved pages tells nothing.
    if (!flight.rows.empty()) {
        model_.observe(flight.work,
                       now_us_ - std::max(flight.began_us, returned_us_.value_or(flight.began_us)));
    }
    proposed_tokens_ += static_cast<std::int64_t>(proposed.tokens.size());
    flights_.pop_front();
    returned_us_.reset();
    if (!order_.empty()) returned_us_ = now_us_;
}

// Takes down which guesses were not run. Nothing is changed if a cut is wrong.
void Scheduler::cut_drafts(Flight& flight, std::span<const CutDraft> cuts) {
    const auto row_of = [&](const CutDraft& cut) {
        return std::ranges::find(flight.rows, SlotId(cut.slot), &Row::slot);
    };
    for (const CutDraft& cut : cuts) {
        const auto row = row_of(cut);
        if (row == flight.rows.end() || cut.guesses < 0 ||
            std::cmp_greater_equal(cut.guesses, row->draft.size())) {
            throw EngineError("step " + text(flight.step.value) + " has no draft in slot " +
                              text(cut.slot) + " that is longer than " + text(cut.guesses));
        }
    }
    for (const CutDraft& cut : cuts) {
        Row& row = *row_of(cut);
        row.cut = row.draft.size() - static_cast<std::size_t>(cut.guesses);
        flight.work.draft_tokens -= static_cast<std::int64_t>(row.cut);
    }
}

void Scheduler::reserve_commit(const Flight& flight) {
    reserve_endings(flight.samples);
    make_room_for(outcome_.requests, flight.samples);
    make_room_for(outcome_.tokens, flight.samples);
    make_room_for(outcome_.sample_indices, flight.samples);
    make_room_for(outcome_.cached_counts, flight.samples);
    manifests_.clear();
    std::size_t swaps = 0;
    for (const Row& row : flight.rows) {
        if (Verifying* verifying = verifying_.at(row.slot)) {
            reserve_landing(*verifying, swaps_);
            each_group([&]<class G>() { swaps += verifying->guesses.of<G>().size(); });
        }
        Stepping* flying = stepping_.at(row.slot);
        if (flying == nullptr) continue;
        reserve_landing(*flying, swaps_);
        flying->request->reserve_tokens(1);
        each_group([&]<class G>() { swaps += flying->pages.of<G>().lent.size(); });
        if (row.samples && flying->request->sends()) {
            manifests_.emplace_back(row.slot, Manifest(*flying));
            each_group([&]<class G>() {
                news_of<G>().handovers.reserve(flying->pages.of<G>().sealed.size() +
                                               flying->pages.of<G>().lent.size());
            });
        }
    }
    make_room_for(transfer_news_.ids, manifests_.size());
    make_room_for(transfer_news_.requests, manifests_.size());
    make_room_for(transfer_news_.kinds, manifests_.size());
    for (GroupPlan& group : news_) group.table.reserve(swaps);
}

// Cached pages that took the place of a request's own: its page table changes.
void Scheduler::tell_swaps(SlotId slot) noexcept {
    for (const Swap& swap : swaps_) {
        news_[static_cast<std::size_t>(swap.group)].table.add(
            slot, static_cast<std::size_t>(swap.index), swap.page);
    }
    swaps_.clear();
}

void Scheduler::land_row(const Row& row, const Retired& done, std::optional<std::int32_t> token,
                         std::int32_t sample) {
    Stepping flying = stepping_.take(row.slot);
    std::optional<FinishReason> end;
    if (token) {
        flying.request->append(*token);
        flying.pending -= TokenCount(1);
        tell_token(*flying.request, *token, sample);
        end = flying.request->end(context_max_);
        if (end) settle_end(*flying.request);
    }
    Landed landed = land(std::move(flying), done, row.start + row.count, store_, swaps_);
    tell_swaps(row.slot);

    if (end) leave_order(row.slot);
    std::visit(
        Overloaded{[&](Prefilling&& request) { prefilling_.put(std::move(request)); },
                   [&](Decoding&& request) {
                       if (!end) {
                           request.proposal = proposal_of(row.slot);
                           decoding_.put(std::move(request));
                       } else if (*end == FinishReason::kLength && request.request->sends()) {
                           hand_over(std::move(request), *end);
                       } else {
                           conclude(finish(std::move(request), *end, store_));
                       }
                   },
                   [&](Stepping&& request) {
                       if (end) {
                           conclude(doom(std::move(request), *end, store_));
                       } else {
                           stepping_.put(std::move(request));
                       }
                   }},
        std::move(landed));
}

void Scheduler::tell_token(const Request& request, std::int32_t token,
                           std::int32_t sample) noexcept {
    outcome_.requests.push_back(request.id().value);
    outcome_.tokens.push_back(token);
    outcome_.sample_indices.push_back(sample);
    outcome_.cached_counts.push_back(request.cached().value);
    ++output_tokens_;
}

void Scheduler::settle_end(const Request& request) noexcept {
    places_.find(request.id().value)->second.outputs = request.outputs();
    answers_.add(request.outputs());
}

void Scheduler::land_verifying(const Row& row, const Retired& done,
                               std::span<const std::int32_t> samples, std::int32_t first) {
    Verifying flying = verifying_.take(row.slot);
    const Verified verified = verify(flying, samples, context_max_);
    const auto count = static_cast<std::int32_t>(verified.tokens().size());
    for (std::int32_t i = 0; i < count; ++i) {
        tell_token(*flying.request, verified.tokens()[static_cast<std::size_t>(i)], first + i);
    }
    const TokenCount cut(static_cast<std::int32_t>(row.cut));
    drafted_tokens_ -= cut.value;
    accepted_tokens_ += verified.accepted().value;
    Place& place = places_.find(flying.request->id().value)->second;
    place.drafted -= cut;
    place.accepted += verified.accepted();
    turns_.charge(line_of(row.slot), count - 1);
    Decoding landed = land(std::move(flying), done, verified, store_, swaps_);
    tell_swaps(row.slot);
    if (const auto end = landed.request->end(context_max_)) {
        settle_end(*landed.request);
        leave_order(row.slot);
        conclude(finish(std::move(landed), *end, store_));
    } else {
        landed.proposal = proposal_of(row.slot);
        decoding_.put(std::move(landed));
    }
}

void Scheduler::hand_over(Decoding&& request, FinishReason reason) noexcept {
    const SlotId slot = request.slot.id();
    const auto manifest = std::ranges::find(
        manifests_, slot, [](const auto& entry) -> const SlotId& { return entry.first; });
    const TransferId transfer = transfers_.begin(slot);
    const std::int32_t entry = tell_transfer(transfer, TransferKind::kSend, request.request->id());
    const Sending& sending = sending_.put(
        send(std::move(request), reason, transfer, std::move(manifest->second), store_));
    each_group([&]<class G>() {
        const Departures<G>& departures = sending.departures.of<G>();
        std::int32_t index = departures.first;
        for (const auto& ref : departures.sealed) {
            news_of<G>().handovers.add(entry, index++, ref.id().value);
        }
        for (const auto& page : departures.tail) {
            news_of<G>().handovers.add(entry, index++, page.id().value);
        }
    });
}

std::int32_t Scheduler::tell_transfer(TransferId transfer, TransferKind kind,
                                      RequestId request) noexcept {
    transfer_news_.ids.push_back(transfer.value);
    transfer_news_.requests.push_back(request.value);
    transfer_news_.kinds.push_back(static_cast<std::int32_t>(kind));
    return static_cast<std::int32_t>(transfer_news_.ids.size()) - 1;
}

void Scheduler::land_doomed(SlotId slot, const Retired& done) noexcept {
    std::visit(Overloaded{[&](Doomed&& request) { doomed_.put(std::move(request)); },
                          [&](const Finished& request) { forget(request.id); }},
               land(doomed_.take(slot), done, store_));
}

}  // namespace tokenspeed::control
