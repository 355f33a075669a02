// How a drafted step is launched: everything is allocated first, then moved.

#include <algorithm>

#include "scheduler.h"

namespace tokenspeed::control {

Plan Scheduler::launch_drafts() {
    std::size_t tokens = 0, samples = 0;
    std::vector<std::variant<Berth, Draft>> berths;
    berths.reserve(rows_.size());
    for (const Row& row : rows_) {
        if (!row.draft.empty()) {
            berths.emplace_back(Draft(*decoding_.at(row.slot), std::vector(row.draft)));
        } else if (const Stepping* flies = stepping_.at(row.slot)) {
            berths.emplace_back(Berth(*flies, row.count));
        } else if (const Prefilling* rests = prefilling_.at(row.slot)) {
            berths.emplace_back(Berth(*rests, row.count));
        } else {
            berths.emplace_back(Berth(*decoding_.at(row.slot)));
        }
        tokens += static_cast<std::size_t>(row.count.value);
        samples += row.sample_count();
    }
    Plan plan{.step = StepId(0),
              .decode_count = decode_count_,
              .row_slots = {},
              .query_starts = {},
              .context_lens = {},
              .token_ids = {},
              .sample_rows = {},
              .sample_positions = {},
              .propose_counts = {},
              .bound_slots = {},
              .bound_requests = {},
              .transfers = {},
              .groups = {}};
    plan.row_slots.reserve(rows_.size());
    plan.query_starts.reserve(rows_.size() + 1);
    plan.context_lens.reserve(rows_.size());
    plan.token_ids.reserve(tokens);
    plan.sample_rows.reserve(samples);
    plan.sample_positions.reserve(samples);
    if (step_proposals_max_ > 0) plan.propose_counts.reserve(rows_.size());
    plan.groups.reserve(kGroupKinds);
    Flight& flight = flights_.emplace_back(
        Flight{StepId(0), rows_, samples, {}, drafted_work(), returned_us_.value_or(now_us_)});
    try {
        each_group([&]<class G>() {
            if (!store_.index.has<G>()) return;
            GroupPlan& news = news_of<G>();
            if (kPaged<G>) {
                news.kv_slots.reserve(tokens);
                news.table.reserve(tokens / static_cast<std::size_t>(page_size_.value) +
                                   2 * rows_.size());
            } else {
                news.copies.reserve(rows_.size());
                news.saves.reserve(rows_.size());
            }
            news.stores.reserve(store_.index.leaving<G>().size());
            flight.stores.of<G>().reserve(store_.index.leaving<G>().size());
        });
    } catch (...) {
        flights_.pop_back();
        throw;
    }

    plan.step = flight.step = ledger_.launch();
    launch_stores(flight);
    plan.query_starts.push_back(0);
    for (std::size_t i = 0; i < rows_.size(); ++i) {
        const auto index = static_cast<std::int32_t>(i);
        std::visit(
            Overloaded{
                [&](Berth&& berth) { launch_row(rows_[i], index, std::move(berth), plan); },
                [&](Draft&& draft) { speculate_row(rows_[i], index, std::move(draft), plan); }},
            std::move(berths[i]));
    }
    plan.bound_slots = std::exchange(bound_slots_, {});
    plan.bound_requests = std::exchange(bound_requests_, {});
    plan.transfers = std::exchange(transfer_news_, {});
    each_group([&]<class G>() {
        if (!store_.index.has<G>()) return;
        plan.groups.push_back(std::exchange(news_of<G>(), GroupPlan{.kind = G::kKind,
                                                                    .kv_slots = {},
                                                                    .table = {},
                                                                    .stores = {},
                                                                    .copies = {},
                                                                    .saves = {},
                                                                    .loads = {},
                                                                    .handovers = {}}));
    });
    ++steps_;
    return plan;
}

// What left the device since the last step is copied to the host by this one, before it writes.
void Scheduler::launch_stores(Flight& flight) noexcept {
    each_group([&]<class G>() {
        for (Leaving<G>& leaving : store_.index.leaving<G>()) {
            news_of<G>().stores.add(leaving.source.value, leaving.target.id().value);
            flight.stores.of<G>().push_back(
                {std::move(leaving.node), lend(std::move(leaving.target), flight.step)});
        }
        store_.index.leaving<G>().clear();
    });
}

void Scheduler::launch_row(const Row& row, std::int32_t index, Berth&& berth, Plan& plan) noexcept {
    const Prefilling* rests = prefilling_.at(row.slot);
    // The state of a recurrence begins as the checkpoint it goes on from.
    if (rests != nullptr && !rests->pages.recurrent.sealed.empty()) {
        news_of<Recurrent>().copies.add(rests->pages.recurrent.sealed.front().id().value,
                                        rests->pages.recurrent.tail->id().value);
    }
    // Which output token the row samples: those known and those in flight come before it.
    const TokenCount before =
        stepping_.at(row.slot) ? stepping_.at(row.slot)->pending : TokenCount(0);
    Stepping& flying = stepping_.put(
        decoding_.at(row.slot) ? launch(decoding_.take(row.slot), plan.step, std::move(berth))
        : rests != nullptr
            ? launch(prefilling_.take(row.slot), plan.step, row.count, std::move(berth))
            : extend(stepping_.take(row.slot), plan.step, row.count, std::move(berth)));
    flying.proposes = row.propose > 0;
    const Request& request = *flying.request;
    tell_row(row, index, request.outputs() + before, plan);
    const bool decodes = index < plan.decode_count;
    for (TokenCount at = row.start; at < row.start + row.count; at += TokenCount(1)) {
        plan.token_ids.push_back(decodes ? 0
                                         : request.tokens()[static_cast<std::size_t>(at.value)]);
    }
    plan.query_starts.push_back(static_cast<std::int32_t>(plan.token_ids.size()));
    each_group([&]<class G>() {
        if (store_.index.has<G>()) tell_pages<G>(row, flying, plan.step);
    });
}

void Scheduler::speculate_row(const Row& row, std::int32_t index, Draft&& draft,
                              Plan& plan) noexcept {
    const Verifying& flying =
        verifying_.put(speculate(decoding_.take(row.slot), plan.step, std::move(draft)));
    tell_row(row, index, flying.request->outputs(), plan);
    plan.token_ids.push_back(0);
    plan.token_ids.insert(plan.token_ids.end(), flying.draft.begin(), flying.draft.end());
    plan.query_starts.push_back(static_cast<std::int32_t>(plan.token_ids.size()));
    each_group([&]<class G>() {
        if constexpr (kPaged<G>) {
            if (!store_.index.has<G>()) return;
            const Resting<G>& pages = flying.pages.of<G>();
            tell_positions<G>(row, static_cast<std::size_t>(pages.first) + pages.sealed.size(),
                              flying.guesses.of<G>());
        }
    });
    const TokenCount drafted(static_cast<std::int32_t>(flying.draft.size()));
    drafted_tokens_ += drafted.value;
    places_.find(flying.request->id().value)->second.drafted += drafted;
}

// The row as such; `position` is the index of the first output token that it samples.
void Scheduler::tell_row(const Row& row, std::int32_t index, TokenCount position,
                         Plan& plan) noexcept {
    plan.row_slots.push_back(row.slot.value);
    plan.context_lens.push_back(row.start.value);
    if (step_proposals_max_ > 0) plan.propose_counts.push_back(row.propose);
    for (std::size_t i = 0; i < row.sample_count(); ++i) {
        plan.sample_rows.push_back(index);
        plan.sample_positions.push_back(position.value + static_cast<std::int32_t>(i));
    }
}

// Where the row's KV goes, `lent` being pages from `base` on; a page's first token says that the
// table has a new page.
template <class G>
void Scheduler::tell_positions(const Row& row, std::size_t base, const auto& lent) noexcept {
    GroupPlan& news = news_of<G>();
    for (TokenCount at = row.start; at < row.start + row.count; at += TokenCount(1)) {
        const std::size_t page = static_cast<std::size_t>(at.value / page_size_.value);
        const TokenCount offset(at.value % page_size_.value);
        const auto& lease = lent[page - base];
        if (offset == TokenCount(0)) news.table.add(row.slot, page, lease.id().value);
        news.kv_slots.push_back(kv_slot<G>(lease, offset, page_size_));
    }
}

template <class G>
void Scheduler::tell_pages(const Row& row, const Stepping& request,
                           [[maybe_unused]] StepId step) noexcept {
    const Flying<G>& pages = request.pages.of<G>();
    if constexpr (kPaged<G>) {
        tell_positions<G>(row, static_cast<std::size_t>(pages.first) + pages.sealed.size(),
                          pages.lent);
    } else {
        GroupPlan& news = news_of<G>();
        for (const Checkpoint& saved : pages.saved) {
            if (saved.page.until() == step) {
                news.saves.add(pages.lent.front().id().value, saved.page.id().value);
            }
        }
    }
}

}  // namespace tokenspeed::control
