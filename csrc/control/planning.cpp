// How a step is made: rows are drafted, pages found for them, and all of it launched at once.

#include <algorithm>

#include "room.h"
#include "scheduler.h"

namespace tokenspeed::control {

// --- planning -----------------------------------------------------------------------------------

std::optional<Plan> Scheduler::plan() {
    apply_events();
    if (ledger_.full()) return std::nullopt;
    rows_.clear();
    budget_ = step_tokens_max_;
    starved_ = false;
    resting_.reset();
    draft_decodes();
    decode_count_ = static_cast<std::int32_t>(rows_.size());
    draft_prefills();
    if (rows_.empty()) return std::nullopt;
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
        const bool needs = rests != nullptr ? needs_page(*rests) : needs_page(*flies);
        const Room room = needs ? find_page(rank) : Room::kReady;
        if (room == Room::kReady) draft(slot, start, TokenCount(1), true);
        if (room != Room::kGone) ++rank;
    }
}

// Finds the page that the request's next token needs. When the cache has nothing left to evict,
// the request that comes last in order gives way. In flight it cannot: then it is left out of this
// plan, and gives way once its step retired.
Scheduler::Room Scheduler::find_page(std::size_t rank) {
    const SlotId slot = order_[rank];
    for (;;) {
        if (auto page = store_.take()) {
            if (Decoding* rests = decoding_.at(slot)) {
                grow(*rests, std::move(*page));
            } else {
                grow(*stepping_.at(slot), std::move(*page));
            }
            return Room::kReady;
        }
        starved_ = true;
        // Pages are on their way back already.
        if (resting_ || doomed_count_ > 0) return Room::kWait;
        if (order_.size() == 1) {
            if (stepping_.at(slot)) return Room::kWait;
            // Alone it fills the pool: it ends here, and leaves the step to those who wait.
            starved_ = false;
            reserve_endings(1);
            leave_order(slot);
            conclude(finish(decoding_.take(slot), FinishReason::kLength, store_));
            return Room::kGone;
        }
        std::size_t victim = order_.size() - 1;
        while (victim > rank && !may_be_retracted(running(order_[victim]))) --victim;
        // All behind it are about to make progress, after which one of them gives way.
        if (victim == rank && rank + 1 < order_.size()) return Room::kWait;
        if (stepping_.at(order_[victim])) {
            resting_ = order_[victim];
            return Room::kWait;
        }
        retract_from(order_[victim]);
        if (victim == rank) return Room::kGone;
    }
}

void Scheduler::retract_from(SlotId slot) {
    const Request& request = running(slot);
    auto& room = queued_[request.order()];
    places_.at(request.id().value).slot.reset();
    leave_order(slot);
    if (decoding_.at(slot)) {
        room.emplace(retract(decoding_.take(slot), store_));
    } else {
        room.emplace(retract(prefilling_.take(slot), store_));
    }
    ++retractions_;
}

// Running prompts and waiting ones share what the decode rows left of the step, in order: a long
// prompt that runs does not keep out a more urgent one that waits.
void Scheduler::draft_prefills() {
    for (std::size_t rank = 0; rank < order_.size() && budget_ > 0; ++rank) {
        while (admit_head(running(order_[rank]).order())) ++rank;
        const SlotId slot = order_[rank];
        if (resting_ == slot || budget_ == 0) continue;
        const Prefilling* rests = prefilling_.at(slot);
        const Stepping* flies = stepping_.at(slot);
        if (rests == nullptr && flies == nullptr) continue;
        const TokenCount fed = rests != nullptr ? rests->fed : flies->fed;
        const TokenCount known = running(slot).known();
        if (fed >= known) continue;
        const TokenCount chunk = std::min(known - fed, TokenCount(budget_));
        draft(slot, fed, chunk, fed + chunk == known);
    }
    while (admit_head(std::nullopt)) {
    }
}

// Admits the head of the queue if it comes before a given place in the order and has all it needs.
// Nobody overtakes a head that does not fit.
bool Scheduler::admit_head(std::optional<Order> before) {
    while (!queued_.empty() && !queued_.begin()->second) queued_.erase(queued_.begin());
    if (queued_.empty() || budget_ == 0 || starved_ || store_.slots.empty()) return false;
    const auto head = queued_.begin();
    if (before && *before < head->first) return false;
    const Request& request = *head->second->request;
    const PageCount reserve = admission_reserve(order_.size(), request);
    if (blocked_ && blocked_->order == head->first &&
        blocked_->wanted + reserve > store_.available()) {
        return false;
    }
    make_room_for(rows_, 1);
    make_room_for(bound_slots_, 1);
    make_room_for(bound_requests_, 1);
    table_.reserve(request.tokens().size() / static_cast<std::size_t>(page_size_.value));

    auto probed = Admission::probe(*head->second, reserve, store_);
    if (const auto* refused = std::get_if<Admission::Refused>(&probed)) {
        blocked_ = {head->first, refused->wanted};
        return false;
    }
    seat(std::move(*head->second), std::move(*std::get_if<Admission>(&probed)));
    queued_.erase(head);
    return true;
}

// Takes an admitted request to a slot and drafts its first chunk.
void Scheduler::seat(Queued&& queued, Admission&& ticket) noexcept {
    const bool first = !queued.request->was_admitted();
    const Prefilling& request =
        prefilling_.put(admit(std::move(queued), std::move(ticket), *store_.slots.take()));
    const SlotId slot = request.slot.id();
    const RequestId id = request.request->id();
    const TokenCount known = request.request->known();
    if (first) {
        prompt_tokens_ += known.value;
        cached_tokens_ += request.request->cached().value;
    }
    places_.find(id.value)->second.slot = slot;
    const auto behind = std::ranges::find_if(
        order_, [&](SlotId other) { return running(other).order() > request.request->order(); });
    order_.insert(behind, slot);
    bound_slots_.push_back(slot.value);
    bound_requests_.push_back(id.value);
    for (std::size_t i = 0; i < request.sealed.size(); ++i) {
        table_.add(slot, i, request.sealed[i].id());
    }
    const TokenCount chunk = std::min(known - request.fed, TokenCount(budget_));
    draft(slot, request.fed, chunk, request.fed + chunk == known);
}

// --- launching ----------------------------------------------------------------------------------

// Everything is allocated before the first request moves.
Plan Scheduler::launch_drafts() {
    std::size_t tokens = 0, samples = 0, opened = 0;
    std::vector<Berth> berths;
    berths.reserve(rows_.size());
    for (const Row& row : rows_) {
        const std::size_t pages =
            static_cast<std::size_t>(pages_for(row.count, page_size_).value) + 1;
        const Stepping* flies = stepping_.at(row.slot);
        berths.emplace_back(pages + (flies != nullptr ? flies->lent.size() : 0));
        tokens += static_cast<std::size_t>(row.count.value);
        samples += row.samples ? 1 : 0;
        opened += pages;
    }
    table_.reserve(opened);

    Plan plan{.step = StepId(0),
              .decode_count = decode_count_,
              .row_slots = {},
              .query_starts = {},
              .context_lens = {},
              .token_ids = {},
              .sample_rows = {},
              .sample_positions = {},
              .bound_slots = {},
              .bound_requests = {},
              .kv_slots = {},
              .table = {}};
    plan.row_slots.reserve(rows_.size());
    plan.query_starts.reserve(rows_.size() + 1);
    plan.context_lens.reserve(rows_.size());
    plan.token_ids.reserve(tokens);
    plan.kv_slots.reserve(tokens);
    plan.sample_rows.reserve(samples);
    plan.sample_positions.reserve(samples);
    flights_.push_back({StepId(0), rows_, samples});

    plan.step = flights_.back().step = ledger_.launch();
    plan.query_starts.push_back(0);
    for (std::size_t i = 0; i < rows_.size(); ++i) {
        launch_row(rows_[i], static_cast<std::int32_t>(i), std::move(berths[i]), plan);
    }
    plan.bound_slots = std::exchange(bound_slots_, {});
    plan.bound_requests = std::exchange(bound_requests_, {});
    plan.table = std::exchange(table_, {});
    ++steps_;
    return plan;
}

void Scheduler::launch_row(const Row& row, std::int32_t index, Berth&& berth, Plan& plan) noexcept {
    // Which output token the row samples: those known and those in flight come before it.
    const TokenCount before =
        stepping_.at(row.slot) ? stepping_.at(row.slot)->pending : TokenCount(0);
    const bool decodes = index < plan.decode_count;
    Stepping& flying = stepping_.put(
        decoding_.at(row.slot) ? launch(decoding_.take(row.slot), plan.step, std::move(berth))
        : prefilling_.at(row.slot)
            ? launch(prefilling_.take(row.slot), plan.step, row.count, std::move(berth))
            : extend(stepping_.take(row.slot), plan.step, row.count, std::move(berth)));
    const Request& request = *flying.request;

    plan.row_slots.push_back(row.slot.value);
    plan.context_lens.push_back(row.start.value);
    if (row.samples) {
        plan.sample_rows.push_back(index);
        plan.sample_positions.push_back((request.outputs() + before).value);
    }
    for (TokenCount at = row.start; at < row.start + row.count; at += TokenCount(1)) {
        const std::size_t page = static_cast<std::size_t>(at.value / page_size_.value);
        const TokenCount offset(at.value % page_size_.value);
        const InFlight<OpenPage>& lease = flying.lent[page - flying.sealed.size()];
        if (offset == TokenCount(0)) table_.add(row.slot, page, lease.id());
        plan.kv_slots.push_back(kv_slot(lease, offset, page_size_));
        plan.token_ids.push_back(decodes ? 0
                                         : request.tokens()[static_cast<std::size_t>(at.value)]);
    }
    plan.query_starts.push_back(static_cast<std::int32_t>(plan.token_ids.size()));
}

}  // namespace tokenspeed::control
